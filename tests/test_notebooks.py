"""The real notebooks, by papermill, on the smoke profile: real data, training, rollouts and figures."""

import nbformat
import pandas as pd
import pytest

from dtlib import batch, runs
from dtlib.errors import UserError

NOTEBOOKS = sorted((batch.repository() / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """One folder for all notebooks, as the last one gathers what the others recorded."""
    return tmp_path_factory.mktemp("figures")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_repeats_itself(path, figures, capfd):
    """Run twice: the second time every run is found, and the numbers are the same to the byte."""
    trained = []
    for attempt in ("first", "second"):
        batch.run("smoke", [path.stem], figures=str(figures / attempt))
        trained.append({file: file.stat().st_mtime_ns for file in runs.runs_root().rglob("*") if file.is_file()})
    folders = [figures / attempt / "smoke" / path.stem for attempt in ("first", "second")]
    numbers = [{file.name: file.read_bytes() for file in sorted(folder.glob("*")) if file.suffix in (".csv", ".json")}
               for folder in folders]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 1
    assert trained[0] == trained[1]
    capfd.readouterr()  # progress bars


def test_notebooks_share_their_settings():
    """So that they share stored runs: the same name has the same default everywhere, but for what each compares."""
    first = batch.defaults(nbformat.read(NOTEBOOKS[0], as_version=4), NOTEBOOKS[0].stem)
    for path in NOTEBOOKS:
        theirs = batch.defaults(nbformat.read(path, as_version=4), path.stem)
        for name in first.keys() & theirs.keys() - {"initialisations", "context"}:
            assert theirs[name] == first[name], f"{path.stem}: {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_clean_and_short(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 40


def test_sizes_and_amounts_add_up(tmp_path):
    """Two batches, the second told of the first one's table, give what one batch of all amounts does, to the byte."""
    def table(folder, amounts, **further):
        wishes = {"pretrained": ["markov"], "amounts": amounts, "rate_factors": {"tiny": [1.0, 0.1]}, **further}
        batch.run("smoke", ["11"], wishes, str(tmp_path / folder))
        return tmp_path / folder / "smoke" / "11_size_and_amount" / "size_and_amount.csv"

    first = table("first", {"tiny": ["4k"]})
    at_once, both = table("at once", {"tiny": ["2k", "4k"]}), table("both", {"tiny": ["2k"]}, earlier=str(first))
    assert both.read_bytes() == at_once.read_bytes() != first.read_bytes()
    one = table("one K", {"tiny": ["2k"]}, pretrained=["iid"], context=1)
    joined = pd.read_csv(table("joined", {"tiny": ["2k"]}, earlier=str(one)))
    assert {*zip(joined.kind, joined.K, strict=True)} == {
        ("random-matched", 20), ("random-matched", 1), ("markov", 20), ("markov", 1), ("iid", 1)}
    with pytest.raises(UserError, match="Of the 4 runs that .* shares with those made now, 0 are the same"):
        table("other", {"tiny": []}, earlier=str(first), warmup_steps=3, no_context=2)


def test_too_few_initialisations_are_said_before_hours_of_training():
    for name, few in (("03", ["random", "language"]), ("05", ["random"])):
        with pytest.raises(UserError, match=f"a random start with language.*got the initialisations {', '.join(few)}: give"):
            batch.plan(NOTEBOOKS[0].parent, "laptop", [name], {"initialisations": few})
