"""Figures: the interval over seeds, the same bytes twice, numbers beside pictures."""

import itertools
import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from dtlib import plots
from dtlib.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@pytest.mark.parametrize("seeds", [3, 5])
def test_interval_against_every_possible_resample(seeds):
    values = np.random.default_rng(1).normal(size=(seeds, 4))
    everything = np.array([values[list(draw)].mean(axis=0) for draw in itertools.product(range(seeds), repeat=seeds)])
    expected = np.percentile(everything, [2.5, 97.5], axis=0, method="inverted_cdf")
    mean, low, high = plots.interval(values)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    # The resamples are a draw from all those that exist; the spread of one mean sets the scale of the error.
    np.testing.assert_allclose([low, high], expected, atol=0.05 * everything.std(axis=0).max() if seeds > 3 else 1e-12)


def test_interval_of_three_seeds_is_their_range_and_of_one_seed_unknown():
    values = np.array([[1.0, 5.0], [2.0, 3.0], [9.0, 4.0]])
    _, low, high = plots.interval(values)
    np.testing.assert_allclose([low, high], [values.min(axis=0), values.max(axis=0)])
    mean, low, high = plots.interval(values[:1])
    assert mean.tolist() == [1.0, 5.0]
    assert np.isnan([low, high]).all()


def test_interval_of_equal_seeds_holds_their_mean():
    for hits in range(1, 30):
        mean, low, high = plots.interval(np.full((3, 1), 100 * hits / 29))
        assert low <= mean <= high


def test_interval_keeps_shape_and_repeats():
    values = np.random.default_rng(2).normal(size=(4, 2, 3))
    first, second = plots.interval(values), plots.interval(values)
    for a, b in zip(first, second, strict=True):
        assert a.shape == (2, 3)
        assert (a == b).all()
    assert [np.shape(part) for part in plots.interval(np.arange(4.0))] == [(), (), ()]


def draw() -> plt.Figure:
    plots.use_style()
    figure, ax = plt.subplots()
    values = np.random.default_rng(3).normal(size=(3, 10)).cumsum(axis=1)
    plots.band(ax, np.arange(10), values, "random-matched", plots.COLOURS["random-matched"])
    plots.band(ax, np.arange(10), values + 3, "something new", None)
    ax.legend()
    return figure


def test_band_draws_mean_seeds_and_interval():
    ax = draw().axes[0]
    assert len(ax.lines) == 2 * (1 + 3)
    assert len(ax.collections) == 2
    assert ax.lines[0].get_linestyle() == "--" and ax.lines[0].get_marker() == "v"
    assert {line.get_color() for line in ax.lines[:4]} == {plots.COLOURS["random-matched"]}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["random-matched", "something new"]
    plt.close("all")


def test_styles_differ_without_colour():
    shared = {"language": "gpt2", "image": "igpt", "image-native": "igpt-native"}  # each stands in the other's place
    assert all(plots.STYLES[ours] == plots.STYLES[theirs] for ours, theirs in shared.items())
    marks = [style[1:] for name, style in plots.STYLES.items() if name not in shared]
    assert len(set(marks)) == len(marks)


def test_every_colour_is_visible_on_white():
    """By the contrast of the web accessibility guidelines, 1 to 21; paper A's own colour for random has 1.8."""
    for name, colour in plots.COLOURS.items():
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05) > 2.5, name


def test_saving_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    table = pd.DataFrame({"epoch": [0, 1], "action_error": [0.1, 1 / 3]})
    saved = []
    for attempt in ("first", "second"):
        monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path / attempt))
        monkeypatch.setenv("SOURCE_DATE_EPOCH", {"first": "0", "second": "1000000000"}[attempt])  # another day
        output = plots.Output("smoke", "00_first")
        output.save(draw(), "curve", table)
        output.record({"b": np.float32(0.5), "a": 1 / 3, "nothing": np.nan, "rows": np.arange(2)})
        plt.close("all")
        saved.append({path.name: path.read_bytes() for path in (tmp_path / attempt / "smoke" / "00_first").iterdir()})
    assert sorted(saved[0]) == ["curve.csv", "curve.pdf", "curve.png", "results.json"]
    assert saved[0] == saved[1]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "first/smoke/00_first/curve.csv"), table, check_exact=True)


def test_record_keeps_every_digit_and_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path))
    monkeypatch.setenv("DTLIB_OVERRIDES", '{"epochs": 2}')
    plots.Output("smoke", "00_first").record({"b": {"score": 1 / 3}, "a": float("inf")})
    text = (tmp_path / "smoke" / "00_first" / "results.json").read_text()
    results = json.loads(text)
    assert results["b"]["score"] == 1 / 3 and results["a"] is None
    assert results["profile"] == "smoke" and results["overrides"] == {"epochs": 2}
    assert {"torch", "mujoco", "gymnasium"} <= set(results["versions"])
    assert text.index('"a"') < text.index('"b"') < text.index('"overrides"')


def test_a_figure_that_cannot_be_drawn_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path))
    figure, ax = plt.subplots()
    ax.set_title("$\\broken{$")
    with pytest.raises(ValueError):
        plots.Output("smoke", "00_first").save(figure, "curve", pd.DataFrame())
    plt.close("all")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_words_and_paragraphs(capsys):
    assert plots.span([0.5]) == "0.50" and plots.span(np.array([1.0, 1.0]), ".1f") == "1.0 [1.0, 1.0]"
    plots.say("one\n   two " + 60 * "word ")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one two word") and max(map(len, lines)) <= 110 and len(lines) == 3


def test_the_repository_is_found_from_inside_it_only(tmp_path, monkeypatch):
    (tmp_path / "repository" / "notebooks").mkdir(parents=True)
    (tmp_path / "repository" / "pyproject.toml").touch()
    monkeypatch.delenv("DTLIB_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path / "repository" / "notebooks")
    assert plots.Output("laptop", "00_first").folder == tmp_path / "repository" / "figures" / "laptop" / "00_first"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not inside the repository"):
        plots.Output("laptop", "00_first")


def test_what_was_measured_is_remembered_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    cells, calls, run = ["profile = 'laptop'", "measure()"], [], SimpleNamespace(record={})
    monkeypatch.setattr(plots, "get_ipython", lambda: SimpleNamespace(user_ns={"In": cells}))
    output = plots.Output("laptop", "02_mutual_information")

    def measured(name="information"):
        def measure():
            calls.append(name)
            return pd.DataFrame({"nats": [1 / 3, np.nan]})

        pd.testing.assert_frame_equal(output.remembered(name, measure, [run]), pd.DataFrame({"nats": [1 / 3, np.nan]}))
        return len(calls)

    assert [measured(), measured(), measured("gradients"), measured()] == [1, 1, 2, 2]
    cells[0] = "profile = 'full'"
    assert [measured(), measured()] == [3, 3]
    run.record["seconds"] = 1
    assert [measured(), measured()] == [4, 4]
    monkeypatch.setattr(plots, "versions", lambda: {"torch": "0"})
    assert [measured(), measured()] == [5, 5]
    (kept,) = tmp_path.glob("measures/laptop/02_mutual_information/information-*")  # the older ones are gone
    kept.write_bytes(kept.read_bytes()[:-9])
    assert [measured(), measured()] == [6, 6]
