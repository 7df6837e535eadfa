"""The worked changes of docs/how-to-add.md apply, and the lines under them run."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import see  # noqa: E402

TEXT = (ROOT / "docs/how-to-add.md").read_text(encoding="utf-8")
WORKED = re.findall(r"```diff\n(.*?)```\n+```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package; starting points and policies are links, as nothing changes them."""
    folder = tmp_path_factory.mktemp("copy")
    large = ("starting_points", "policies")
    shutil.copytree(ROOT / "dtlib", folder / "dtlib", ignore=shutil.ignore_patterns(*large))
    for name in large:
        (folder / "dtlib" / name).symlink_to(ROOT / "dtlib" / name)
    return folder


def test_each_section_has_a_short_change():
    assert len(WORKED) == TEXT.count("```diff") == 3
    for change, _ in WORKED:
        assert len(re.findall(r"^[+-](?![+-])", change, re.MULTILINE)) <= 20


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the changes")
@pytest.mark.parametrize("number", range(3))
def test_a_worked_change_applies_and_runs(number, copy, tmp_path):
    change, lines = WORKED[number]
    git = ["git", "apply", "--recount", "-"]
    applied = subprocess.run(git, input=change, cwd=copy, text=True, capture_output=True)
    assert not applied.returncode, applied.stderr
    about = {**os.environ, "PYTHONPATH": str(copy), "DTLIB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", lines]
    done = subprocess.run(command, cwd=copy, env=about, text=True, capture_output=True)
    assert not done.returncode, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("table", [see.curves, see.changes, see.attention, see.judged])
def test_explorers_have_rows_for_what_can_be_chosen(table):
    given = table()
    for name, values in given["menus"].items():
        found = {str(row[name]) for row in given["rows"]}
        assert found == {value for value in values if value != "all"}, name


def test_films_are_small_and_described():
    films = sorted((ROOT / "docs/films").glob("*.webp"))
    assert {film.stem for film in films} == json.loads(
        (ROOT / "docs/films/films.json").read_text(encoding="utf-8")
    ).keys()
    assert all(film.stat().st_size <= 300_000 for film in films)


def test_windows_are_small_and_their_weights_sum_to_one():
    folder, known = ROOT / "docs/windows", see.looks()
    assert {path.stem for path in folder.glob("*.webp")} == {*known["menus"]["window"]}
    assert all(path.stat().st_size <= 100_000 for path in folder.glob("*.webp"))
    tokens = 3 * known["context"]
    lines = np.tril_indices(tokens)[0]
    for model in known["models"].values():
        for block in (*model["before"], *model["after"]):
            assert [*block] == known["menus"]["window"]
            for packed in block.values():
                heads = np.frombuffer(base64.b64decode(packed), "<u2").reshape(-1, len(lines))
                for weights in heads:
                    sums = np.bincount(lines, weights) / 65535
                    assert np.allclose(sums, 1, atol=tokens / 65535)


def test_claims_that_pandas_cut_are_whole_in_the_book():
    pytest.importorskip("mathjax")
    import build

    rows = [{"claim": "a" * 60, "seeds": 3}, {"claim": "b" * 40 + " & " + "c" * 20}]
    table = "".join(
        f"<tr><th>{i}</th><td>{html.escape(row['claim'][:47])}...</td><td>1</td></tr>"
        for i, row in enumerate([*rows, {"claim": "d" * 60}])
    )
    found = re.findall(r'<td class="long">(.*?)</td>', build.uncut(table, rows))
    wholes = [html.escape(row["claim"]) for row in rows]
    assert found == [*wholes, "d" * 47 + "..."]  # of the third nothing is known
