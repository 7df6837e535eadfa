"""Verdicts of this machine beside the committed ones."""

import json
import subprocess

import pytest

from dtlib.compare import compare, read_results
from dtlib.errors import UserError


def results(effect, verdict, **ends):
    about = {"task": "hopper", "claim": "Blocks move", "rule": "a − b", "measure": "corrected"}
    found = {"effect": effect, "low": effect - 1, "high": effect + 1, "verdict": verdict}
    found |= ends
    return json.dumps({"profile": "laptop", "verdicts": [about | found]})


def test_changed_verdicts_are_named_with_both_effects(tmp_path):
    """Unchanged: one line. Changed: both intervals; a shift of 3 half-intervals is said."""
    path = tmp_path / "figures" / "laptop" / "03_x" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(results(2.0, "supported"))
    assert "no verdicts" in compare(path.parents[1])
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert "1 of 1 verdicts are the committed ones" in compare(path.parents[1])
    path.write_text(results(-1.0, "undecided"))
    said = compare(path.parents[1])
    assert "0 of 1" in said and "is 3 of its half-interval" in said
    assert "committed: supported, 2.000 [1.000, 3.000]" in said
    assert "here: undecided, -1.000 [-2.000, 0.000]" in said
    path.write_text(results(-1.0, "undecided", low=None, high=None))  # from two seeds
    assert "here: undecided, -1.000\n" in compare(path.parents[1]) + "\n"
    path.write_text(results(2.0, "supported").replace("Blocks", "All blocks"))
    said = compare(path.parents[1])
    assert "0 of 0" in said and "1 only here" in said and "1 only committed" in said
    twice = json.loads(results(2.0, "supported"))
    path.write_text(json.dumps(twice | {"verdicts": twice["verdicts"] * 2}))
    with pytest.raises(UserError, match="has a verdict twice"):
        compare(path.parents[1])
    path.write_text(results(-1.0, "undecided")[:-9])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        compare(path.parents[1])


@pytest.mark.parametrize("text", ["", "[]", "3", '{"verdicts": 3}', '{"verdicts": [{}]}'])
def test_results_that_are_none_are_a_sentence(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/results.json is damaged"):
        read_results(tmp_path / "results.json")


def test_without_git_there_is_nothing_to_compare_with(tmp_path, monkeypatch):
    (tmp_path / "03_x").mkdir()
    (tmp_path / "03_x" / "results.json").write_text(results(2.0, "supported"))
    monkeypatch.setenv("PATH", "")
    assert "no verdicts" in compare(tmp_path)


def test_results_of_other_settings_are_left_out_and_named(tmp_path):
    """Copied from another profile's folder, say: their numbers are not this profile's."""
    path = tmp_path / "figures/seeds/03_x/results.json"
    path.parent.mkdir(parents=True)
    path.write_text(results(2.0, "supported").replace("laptop", "seeds"))
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    path.write_text(results(3.0, "supported"))
    assert "Left out: 03_x, run with profile laptop" in compare(path.parents[1])
