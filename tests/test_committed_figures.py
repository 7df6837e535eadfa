"""Committed figures come from today's notebooks, and each names the cell that draws it."""

import json
import runpy
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dtlib.batch import find, with_links
from dtlib.compare import read_results, read_table
from dtlib.storage import notebook_hash

ROOT = Path(__file__).parents[1]
# Whoever changes a notebook draws these anew: it takes minutes on any machine. The sets of other
# profiles take hours, on other machines; their README says from which commit they are.
CHECKED = ("laptop", "seeds")


def committed():
    """Folders ``figures/<profile>/<notebook>`` with committed files, of the profiles checked."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "figures"], cwd=ROOT, capture_output=True, text=True
    )
    parents = {Path(name).parent for name in listed.stdout.split("\0") if name.count("/") == 3}
    return sorted(str(folder) for folder in parents if folder.parts[1] in CHECKED)


def code_cells(notebook):
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def is_text(cell):
    return cell.cell_type == "markdown"


def test_there_are_committed_figures():
    if not (ROOT / ".git").exists():
        pytest.skip("without git, nothing says which figures are committed")
    notebooks = [path.stem for path in find(ROOT / "notebooks", None)]
    found = [Path(name).name for name in committed() if Path(name).parent.name == "laptop"]
    assert found == notebooks


@pytest.mark.parametrize("folder", committed())
def test_every_table_is_as_it_was_written(folder):
    for path in (tables := sorted((ROOT / folder).glob("*.csv"))):
        read_table(path)
    known = read_results(ROOT / folder / "results.json")["tables"]
    assert sorted(known) == [path.stem for path in tables]


@pytest.mark.parametrize("folder", committed())
def test_is_drawn_by_the_notebook_of_today(folder):
    _, profile, notebook = Path(folder).parts
    results = json.loads((ROOT / folder / "results.json").read_text(encoding="utf-8"))
    today = notebook_hash(ROOT / "notebooks" / f"{notebook}.ipynb")
    command = f"python -m dtlib figures --profile {profile} {notebook}"
    assert results.get("notebook") == today, f"{folder} is stale: run `{command}` and commit it"
    assert results["profile"] == profile
    assert results["overrides"] == {}, f"{folder} was drawn with other settings: run `{command}`"


@pytest.mark.parametrize("folder", committed())
def test_names_the_cell_that_draws_each_figure(folder):
    notebook = Path(folder).name
    drawn = json.loads((ROOT / folder / "figures.json").read_text(encoding="utf-8"))
    assert sorted(drawn) == sorted(path.stem for path in (ROOT / folder).glob("*.png"))
    tags = [tag for cell in code_cells(notebook) for tag in cell["metadata"].get("tags", [])]
    for name, entry in drawn.items():
        assert entry["notebook"] == notebook and entry["commit"], name
        assert tags.count(entry["cell"]) == 1, f"{notebook} has no cell {entry['cell']!r} ({name})"
        for suffix in ("pdf", "csv"):
            assert (ROOT / folder / f"{name}.{suffix}").is_file(), f"{name}.{suffix}"


@pytest.mark.parametrize("folder", committed())
def test_the_text_to_read_is_the_one_of_today(folder):
    """GitHub shows the executed copy: its words are the notebook's, its links lead to the same."""
    home, name = ROOT / "notebooks", Path(folder).name
    texts = [
        [cell.source for cell in nbformat.read(path, as_version=4).cells if is_text(cell)]
        for path in (ROOT / folder / "executed.ipynb", home / f"{name}.ipynb")
    ]
    today = [with_links(text, home, ROOT / folder) for text in texts[1]]
    assert texts[0] == today, f"{folder} is stale: run `python scripts/refresh_prose.py`, commit it"


@pytest.mark.parametrize("folder", committed())
def test_the_notebook_to_read_is_the_one_of_today(folder):
    _, profile, notebook = Path(folder).parts
    path = ROOT / folder / "executed.ipynb"
    command = f"python -m dtlib figures --profile {profile} {notebook}"
    assert path.is_file(), f"{path} is absent: run `{command}` and commit it"
    assert path.stat().st_size < 2e6, "pictures are kept small"
    executed = nbformat.read(path, as_version=4)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    read = [cell.source for cell in cells if cell.metadata.get("tags") != ["injected-parameters"]]
    today = ["".join(cell["source"]) for cell in code_cells(notebook)]
    assert read == today, f"{path} is stale: run `{command}` and commit it"
    for machine in ("/home/", "/Users/", "/root/", "/tmp/"):
        assert machine not in nbformat.writes(executed), f"{path} names a folder of one machine"


def test_text_is_refreshed_and_nothing_else(tmp_path):
    """New, changed and absent Markdown follows the notebook; links still lead to the same files."""
    refreshed = runpy.run_path(str(ROOT / "scripts/refresh_prose.py"))["refreshed"]
    home, folder = tmp_path / "notebooks", tmp_path / "figures/laptop/00_first"
    home.mkdir()
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    about = [{"id": "p", "metadata": {"tags": ["parameters"]}}, {"id": "c", "metadata": {}}]
    today = new_notebook(
        cells=[
            new_code_cell("seeds = [0]", **about[0]),
            new_markdown_cell("![a](../figures/laptop/00_first/a.png) [b](absent.md)", id="new"),
            new_code_cell("1 + 1", **about[1]),
            new_markdown_cell("today", id="old"),
        ]
    )
    shown = new_code_cell("1 + 1", **about[1], execution_count=2)
    parts = [
        new_code_cell("seeds = [0]", **about[0]),
        new_code_cell("seeds = [1]", id="i", metadata={"tags": ["injected-parameters"]}),
        new_markdown_cell("no more", id="gone"),
        shown,
        new_markdown_cell("before", id="old"),
    ]
    copy = new_notebook(cells=parts)
    assert refreshed(copy, today, home, folder)
    assert [cell.id for cell in copy.cells] == ["p", "i", "new", "c", "old"]
    assert copy.cells[2].source == "![a](a.png) [b](absent.md)" and copy.cells[4].source == "today"
    assert copy.cells[3] == shown
    today.cells[2].source = "1 + 2"
    assert not refreshed(copy, today, home, folder) and copy.cells[4].source == "today"
