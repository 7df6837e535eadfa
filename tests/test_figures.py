"""Figures: the interval over seeds, the same bytes twice, numbers beside pictures."""

import itertools
import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dtlib import figures, layout, profiles, storage
from dtlib.compare import read_results, read_table
from dtlib.errors import UserError
from dtlib.tasks import get_task

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def test_t_interval_against_scipy():
    values = np.random.default_rng(2).normal(size=(4, 2, 3))
    mean, low, high = figures.t_interval(values)
    expected = stats.t.interval(0.95, 3, values.mean(axis=0), stats.sem(values, axis=0))
    np.testing.assert_allclose([low, high], expected)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    assert [np.shape(part) for part in figures.t_interval(np.arange(4.0))] == [(), (), ()]


def test_t_interval_below_three_seeds_is_unknown():
    for seeds in (1, 2):
        mean, *ends = figures.t_interval(np.full((seeds, 2), 5.0))
        assert mean.tolist() == [5.0, 5.0]
        assert np.isnan(ends).all()
    assert np.isnan(figures.t_interval([])).all()


def draw() -> plt.Figure:
    figures.use_style()
    figure, ax = plt.subplots()
    values = np.random.default_rng(3).normal(size=(2, 10)).cumsum(axis=1)
    for name, own in zip(("random-matched", "something new"), values, strict=True):
        ax.plot(own, label=name, **figures.look(name))
    ax.legend()
    return figure


def test_a_figure_is_described_in_words():
    figure = draw()
    figure.axes[0].set(title="hopper", xlabel="step", ylabel="action error")
    figures.note(figure.axes[0], "ticks: seeds")
    words = "Two curves. hopper: action error against step. random-matched, something new."
    words += " ticks: seeds."
    assert figures.alt_text(figure, "two_curves") == words


def test_styles_differ_without_colour():
    """Each of ALIASES stands in the other's place: it looks the same on purpose."""
    marks = [style[1:] for name, style in figures.STYLES.items() if name not in figures.ALIASES]
    assert len(set(marks)) == len(marks)


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "full": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
XYZ += [[0.0193339, 0.1191920, 0.9503041]]


def lab(colour, vision):
    """CIE 1976 L*a*b* of an sRGB colour as it is seen (D65)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    ratio = np.array(XYZ) @ seen / np.sum(XYZ, axis=1)
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_known_colours_in_lab():
    np.testing.assert_allclose(lab((1, 1, 1), "full"), [100, 0, 0], atol=0.01)
    np.testing.assert_allclose(lab((1, 0, 0), "full"), [53.24, 80.09, 67.20], atol=0.01)


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_are_told_apart(vision):
    """By ΔE >= 20: of starting points, whose aliases look alike on purpose."""
    own = {n: lab(c, vision) for n, c in figures.COLOURS.items() if n not in figures.ALIASES}
    for (a, first), (b, second) in itertools.combinations(own.items(), 2):
        assert np.linalg.norm(first - second) >= 20, f"{a} and {b}"


def test_t_interval():
    mean, low, high = figures.t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.302653 / 3**0.5) == mean - low
    assert np.isnan(figures.t_interval([1.0, 2.0])[1:]).all()


TABLE = pd.DataFrame({"random": [1.0, 2.0, 3.0], "markov": [1.5, 2.5, 3.8]})


def test_dots_draw_means_seeds_and_paired_differences():
    figure, (plain, paired) = plt.subplots(1, 2)
    figures.dots(plain, {"first": TABLE, "second": TABLE + 1})
    assert [label.get_text() for label in plain.get_yticklabels()] == ["first", "second"]
    assert len(plain.containers) == 4 and plain.yaxis_inverted()
    figures.dots(paired, {"first": TABLE}, against="random")
    ((line, _, _),) = paired.containers
    assert line.get_xdata() == pytest.approx([0.6])
    assert line.get_color() == figures.COLOURS["markov"]
    plt.close(figure)


def ends(container):
    """Where the mark of ``dots`` stands, and from where to where its bar reaches."""
    mark, _, (line,) = container
    return [*mark.get_xdata(), *line.get_segments()[0][:, 0]]


@pytest.mark.parametrize("scale", ["before", "after"])
def test_bars_on_a_logarithmic_axis_are_those_of_the_logarithms(scale):
    """Whether the scale is chosen before or after ``dots``; none is cut at the left."""
    figure, ax = plt.subplots()
    table = pd.DataFrame({"random": [0.001, 0.01, 0.1], "markov": [1.0, np.nan, np.nan]})
    table["image"] = np.nan  # draws nothing, and spoils nothing
    if scale == "before":
        ax.set_xscale("log")
    figures.dots(ax, {"first": table})
    ax.set_xscale("log")
    layout.fit_bars(ax)
    middle, low, high = np.exp(figures.t_interval(np.log([0.001, 0.01, 0.1])))
    assert ends(ax.containers[0]) == pytest.approx([middle, low, high])
    assert middle == pytest.approx(0.01) and ax.get_xlim()[0] < low and high < ax.get_xlim()[1]
    assert layout.LOG_BARS in ax.notes
    plt.close(figure)


def test_a_value_of_zero_keeps_the_bars_of_the_values():
    figure, ax = plt.subplots()
    figures.dots(ax, {"first": pd.DataFrame({"random": [0.0, 1.0, 2.0], "markov": [1, 2, 3]})})
    before = [ends(container) for container in ax.containers]
    ax.set_xscale("log")
    layout.fit_bars(ax)
    assert [ends(container) for container in ax.containers] == before
    assert layout.LOG_BARS not in ax.notes
    plt.close(figure)


def test_the_chosen_ticks_stay_in_view_on_a_logarithmic_axis():
    figure, ax = plt.subplots()
    figures.dots(ax, {"first": TABLE})
    ax.set_xscale("log")
    ax.set_xticks([1, 10], ["1", "10"])
    layout.fit_bars(ax)
    assert ax.get_xlim()[1] >= 10
    plt.close(figure)


def test_bars_end_where_the_quantity_ends():
    figure, ax = plt.subplots()
    figures.dots(ax, {"first": pd.DataFrame({"random": [0.5, 0.9, 1.0]})}, within=(0, 1))
    mean, low, _ = figures.t_interval([0.5, 0.9, 1.0])
    assert ends(ax.containers[0]) == pytest.approx([mean, low, 1])
    plt.close(figure)


def test_a_bar_that_leaves_the_axis_says_its_numbers():
    figure, ax = plt.subplots()
    table = pd.DataFrame({"random": [-400.0, -300, -200], "markov": [1.0, 2.0, 3.0]})
    figures.dots(ax, {"first": table, "second": table[["markov"]]}, shown=(-10, 10))
    assert ax.get_xlim() == (-10, 10)
    (words,) = ax.texts
    assert words.get_text() == "−300 [−548, −52]"
    assert words.get_color() == figures.look("random")["color"]  # two starts share the row
    figures.dots(ax, {"first": table[["random"]][:1]}, shown=(-10, 10))  # one seed: no interval
    assert ax.texts[-1].get_text() == "−400"
    plt.close(figure)


def test_starting_points_stand_in_one_order():
    names = ["mine", "markov", "smollm2", "language-shuffled", "random-matched", "random"]
    ordered = ["random", "random-matched", "smollm2", "language-shuffled", "markov", "mine"]
    assert figures.in_order(names) == ordered
    figure = plt.figure()
    figures.name_marks(figure, names)
    assert len(figure.legends[0].get_texts()) == len(names)
    plt.close(figure)


def test_series_draw_means_side_by_side():
    figure, ax = plt.subplots()
    by_depth = pd.DataFrame({0.0: [1.0, 2.0, 3.0], 1.0: [2.0, 3.0, 4.0]})
    figures.series(ax, {"random": by_depth, "markov": by_depth})
    lines = [container[0] for container in ax.containers]
    assert [line.get_ydata().tolist() for line in lines] == [[2, 3], [2, 3]]
    assert lines[0].get_xdata() == pytest.approx([-0.0125, 0.9875])
    plt.close(figure)


def test_lines_carry_their_names():
    figure, ax = plt.subplots()
    figures.lines(ax, pd.DataFrame({"random": [1.0, 2.0, np.nan], "markov": [1.0, 2.0, 3.0]}))
    assert [(text.get_text(), text.xy) for text in ax.texts] == [
        ("random", (1, 2)),
        ("markov", (2, 3)),
    ]
    plt.close(figure)


def test_a_film_strip_holds_first_and_last_moment(monkeypatch, capsys):
    figure, ax = plt.subplots()
    task, states = get_task("hopper"), np.zeros((15, 11))
    monkeypatch.setattr(figures, "render", lambda task, states, pixels: [np.ones((4, 5, 3))] * 3)
    assert figures.film_strip(ax, task, states, count=3).tolist() == [0, 7, 14]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "7", "14"]
    monkeypatch.undo()

    class Without:
        def make_environment(self, **_):
            raise OSError("no display")

    assert figures.render(Without(), states) == []
    assert "There are no frames" in capsys.readouterr().out
    plt.close(figure)


def test_tokens_are_drawn_three_a_step():
    figure, ax = plt.subplots()
    figures.tokens(ax, np.array([6.0, 5.0]), np.zeros((2, 4)), np.zeros((2, 3)))
    assert len(ax.images) == 4 and {"6", "5"} <= {text.get_text() for text in ax.texts}
    plt.close(figure)


def test_learning_curves_end_with_paired_differences():
    curves = pd.DataFrame(
        [
            {"initialisation": name, "seed": seed, "step": step, "action_error": step + value}
            for name in TABLE
            for seed, value in enumerate(TABLE[name])
            for step in (0, 200)
        ]
    )
    figure = figures.learning_curves(curves, [*TABLE], "random", {"action_error": "error"})
    left, end = figure.axes
    assert [line.get_xdata().tolist() for line in left.lines] == [[200]] * 2  # not the start
    assert left.lines[0].get_ydata() == pytest.approx([202])  # the control's mean
    assert end.containers[0][0].get_xdata() == pytest.approx([0.6])
    assert [text.get_text() for text in end.get_yticklabels()] == ["markov"]
    plt.close(figure)


def test_strip_draws_one_mark_a_word():
    figure, ax = plt.subplots()
    words = pd.DataFrame({"as written": ["supported", ""], "corrected": ["undecided"] * 2})
    figures.strip(ax, words)
    assert [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines] == [(0, 0), (1, 0), (1, 1)]
    figures.name_marks(figure, figures.VERDICTS, figures.VERDICTS)
    assert len(figure.legends[0].legend_handles) == 3
    plt.close(figure)


@pytest.mark.parametrize("number, rows", [(4, ["abcd"]), (5, ["abc", "de"]), (9, ["abc"] * 3)])
def test_names_stand_in_rows_of_alike_length(number, rows):
    """At most four in a row; they are read row by row, though matplotlib fills columns."""
    figure, names = plt.figure(), "abcdefghi"[:number]
    figures.name_marks(figure, names)
    figure.draw_without_rendering()
    places = {}
    for text in figure.legends[0].get_texts():
        x, y = text.get_window_extent().p0
        places.setdefault(-round(y, -1), []).append((x, text.get_text()))
    read = ["".join(name for _, name in sorted(row)) for _, row in sorted(places.items())]
    assert [len(row) for row in read] == [len(row) for row in rows] and "".join(read) == names
    plt.close(figure)


@pytest.mark.parametrize("decades", [0.6, 1.3, 1.9, 2.3, 3.2, 5])
def test_numbers_of_a_logarithmic_axis_do_not_touch(decades):
    figures.use_style()
    figure, axes = plt.subplots(2, 1, figsize=(3.0, 4.0))
    for ax in axes:
        ax.plot(np.geomspace(0.03, 0.03 * 10**decades, 9))
        figures.log_axis(ax)
    figure.draw_without_rendering()
    low, high = ax.get_ylim()
    labels = [
        label.get_window_extent()
        for label in ax.get_yticklabels()
        if label.get_text() and low <= label.get_position()[1] <= high
    ]
    assert len(labels) > 1
    for below, above in itertools.pairwise(sorted(labels, key=lambda box: box.y0)):
        assert below.y1 <= above.y0
    plt.close(figure)


def test_lines_to_compare_with_have_names_and_styles():
    figure, ax = plt.subplots()
    figures.reference(ax, 0.5, "half")
    figures.reference_x(ax, 0.2, "left of it", "--", side="left")
    figures.reference_x(ax, 0.2, "right of it")
    names = {text.get_text(): text.get_window_extent() for text in ax.texts}
    at = ax.transData.transform((0.2, 0))[0]
    assert names["left of it"].x1 < at < names["right of it"].x0 and "half" in names
    assert [line.get_linestyle() for line in ax.lines] == [":", "--", ":"]
    plt.close(figure)


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_marks_and_bars_are_stands_below_the_figure_once(seeds):
    """And only if they are drawn: of one seed there is neither."""
    figure, axes = plt.subplots(1, 2)
    for ax in axes:
        figures.dots(ax, {"first": pd.DataFrame({"random": np.arange(seeds)})})
    box = layout.framed(figure, dpi=100)
    below = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert below.count("t-interval") == below.lower().count("ticks") == (seeds > 1)
    assert (box.y0 < 0) == (seeds > 1)
    plt.close(figure)


def test_a_picture_holds_what_sticks_out_of_its_figure():
    figure, ax = plt.subplots(figsize=(1.0, 1.0))
    title = ax.set_title("a title that is wider than its figure")
    figure.legend([plt.Line2D([], [])], ["a name"], loc="outside lower center")
    layout.note(ax, "what is drawn")
    box = layout.framed(figure, dpi=100)
    for artist in (title, *figure.texts, *figure.legends):
        inches = artist.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        assert box.x0 <= inches.x0 and box.y0 <= inches.y0
        assert inches.x1 <= box.x1 and inches.y1 <= box.y1
    legend, (text,) = figure.legends[0].get_window_extent(), figure.texts
    assert text.get_window_extent().y1 <= legend.y0
    plt.close(figure)


def test_tables_show_whole_texts():
    figures.use_style()
    claim = "a claim of more than fifty letters, which is not to be cut anywhere"
    assert claim in pd.DataFrame({"claim": [claim]}).to_html()


def test_explore_draws_the_first_picture_in_a_batch_and_controls_otherwise(monkeypatch):
    shown = []

    def show(seed=1, epoch=3):
        shown.append((seed, epoch))

    monkeypatch.setenv("DTLIB_FIGURES", "anywhere")
    figures.explore(show, seed=[0, 1], epoch=(0, 3))
    assert shown == [(1, 3)]
    monkeypatch.delenv("DTLIB_FIGURES")
    displayed = []
    monkeypatch.setattr(figures.display, "display", displayed.append)
    figures.explore(show, seed=[0, 1], epoch=(0, 3))
    seed, epoch, _ = displayed[0].children
    assert (seed.value, epoch.value, epoch.continuous_update) == (1, 3, False)


def test_every_colour_is_visible_on_white():
    """By the web accessibility guidelines' contrast, 1 to 21; paper A's own random has 1.8."""
    for name, colour in figures.COLOURS.items():
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05) > 2.5, name


def write_notebook(folder, *sources):
    """A notebook with a cell of text and a code cell for each of ``sources``."""
    cells = [{"cell_type": "code", "source": list(source.splitlines(True))} for source in sources]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "00_first.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "text"}, *cells]}))
    return path


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the notebook 00_first, as the current folder."""
    folder = tmp_path / "repository"
    write_notebook(folder / "notebooks", "epochs = 3", "print(epochs)\nprint()")
    (folder / "pyproject.toml").touch()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DTLIB_FIGURES", raising=False)
    return folder


def test_saving_twice_gives_the_same_bytes(repository, tmp_path, monkeypatch):
    table = pd.DataFrame({"epoch": [0, 1], "action_error": [0.1, 1 / 3]})
    saved = []
    for attempt in ("first", "second"):
        monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path / attempt))
        monkeypatch.setenv(
            "SOURCE_DATE_EPOCH", {"first": "0", "second": "1000000000"}[attempt]
        )  # another day
        output = figures.Output("smoke", "00_first")
        output.save(draw(), "curve", table)
        output.record({"b": np.float32(0.5), "a": 1 / 3, "nothing": np.nan, "rows": np.arange(2)})
        plt.close("all")
        folder = tmp_path / attempt / "smoke" / "00_first"
        saved.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(saved[0]) == ["curve.csv", "curve.pdf", "curve.png", "results.json"]
    assert saved[0] == saved[1]
    read = pd.read_csv(tmp_path / "first/smoke/00_first/curve.csv")
    pd.testing.assert_frame_equal(read, table, check_exact=True)


def test_record_keeps_every_digit_and_says_where_it_comes_from(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path))
    monkeypatch.setenv("DTLIB_OVERRIDES", '{"seeds": [0], "epochs": 5}')
    monkeypatch.setenv("DTLIB_NOTEBOOK", "00_first")
    monkeypatch.setenv("DTLIB_HASH", "of what the batch runs")
    figures.Output("smoke", "00_first", {"epochs": 2}).record({"b": {"score": 1 / 3}, "a": np.inf})
    text = (tmp_path / "smoke" / "00_first" / "results.json").read_text()
    results = json.loads(text)
    assert results["b"]["score"] == 1 / 3 and results["a"] is None
    assert results["profile"] == "smoke" and results["overrides"] == {"seeds": [0], "epochs": 2}
    assert {"torch", "mujoco", "gymnasium"} <= set(results["versions"])
    assert results["notebook"] == "of what the batch runs" and results["tables"] == {}
    assert text.index('"a"') < text.index('"b"') < text.index('"overrides"')


def test_record_tells_of_the_profiles_values_and_of_edits(repository, monkeypatch):
    output = figures.Output("smoke", "00_first")
    output.record({"score": 1 / 3, "verdicts": []})
    path = output.folder / "results.json"
    assert read_results(path)["profile_values"] == profiles.values_digest("smoke")
    path.write_text(path.read_text().replace("0.33", "0.34"))
    with pytest.raises(UserError, match=f"{path} is damaged .*edited"):
        read_results(path)
    monkeypatch.setenv("DTLIB_VALUES", profiles.values_digest("laptop"))
    with pytest.raises(UserError, match="Profile smoke changed since the batch began"):
        figures.Output("smoke", "00_first")


def test_a_table_is_read_only_as_it_was_written(repository):
    output, table = figures.Output("smoke", "00_first"), pd.DataFrame({"gain": [1 / 3]})
    output.table("curve", table)
    output.record({})
    path = output.folder / "curve.csv"
    pd.testing.assert_frame_equal(read_table(path), table)
    path.write_text(path.read_text().replace("0.33", "0.66"))
    with pytest.raises(UserError, match=f"{path} cannot be read .*edited.*run its notebook again"):
        read_table(path)


def test_the_first_new_file_takes_away_what_tells_of_the_old_ones(repository):
    output = figures.Output("smoke", "00_first")
    output.table("curve", pd.DataFrame())
    output.record({})
    (output.folder / "figures.json").write_text("{}")
    again = figures.Output("smoke", "00_first")  # a run that fails before it has any result
    assert (output.folder / "results.json").exists()
    again.table("curve", pd.DataFrame())
    assert [path.name for path in output.folder.iterdir()] == ["curve.csv"]


def test_the_hash_is_of_all_code_and_of_code_only(tmp_path):
    known = {
        storage.notebook_hash(write_notebook(tmp_path, *sources))
        for sources in (["a = 1", "b"], ["a = 1", "c"], ["a = 1b"], ["a = 1"], ["b", "a = 1"])
    }
    assert len(known) == 5
    path = write_notebook(tmp_path, "a = 1\nb")
    first = storage.notebook_hash(path)
    content = json.loads(path.read_text())
    content["cells"][0]["source"] = "other text"
    content["cells"][1]["source"] = "a = 1\nb"  # a string for a list of lines, as nbformat allows
    content["cells"][1] |= {"outputs": [1], "execution_count": 7}
    path.write_text(json.dumps(content))
    assert storage.notebook_hash(path) == first


def test_a_figure_that_cannot_be_drawn_leaves_nothing_behind(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path / "figures"))
    figure, ax = plt.subplots()
    ax.set_title("$\\broken{$")
    with pytest.raises(ValueError):
        figures.Output("smoke", "00_first").save(figure, "curve", pd.DataFrame())
    plt.close("all")
    assert not [path for path in (tmp_path / "figures").rglob("*") if path.is_file()]


def test_words_and_paragraphs(capsys):
    assert figures.span([0.5]) == "0.50" and figures.span(np.ones(3), ".1f") == "1.0 [1.0, 1.0]"
    figures.sentence("one\n   two " + 60 * "word ")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one two word") and max(map(len, lines)) <= 100 and len(lines) == 4


def test_playing_never_overwrites_results(repository, tmp_path, monkeypatch):
    assert figures.Output("laptop", "00_first").folder == repository / "figures/mine/00_first"
    monkeypatch.chdir(repository / "notebooks")
    assert figures.Output("laptop", "99_own").hash is None  # a notebook of the reader's, anywhere
    assert figures.Output("full", "00_first").folder == repository / "figures/mine/00_first"
    monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path / "batch"))
    assert figures.Output("full", "00_first").folder == tmp_path / "batch/full/00_first"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DTLIB_FIGURES")
    with pytest.raises(UserError, match="not inside the repository"):
        figures.Output("laptop", "00_first")


def test_what_was_measured_is_remembered_until_something_changes(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    cells, calls, run = ["profile = 'laptop'", "measure()"], [], SimpleNamespace(record={})
    shell = SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setattr(figures, "get_ipython", lambda: shell)
    output = figures.Output("laptop", "00_first")
    table = pd.DataFrame({"nats": [1 / 3, np.nan]})

    def measured(name="information"):
        def measure():
            calls.append(name)
            return table.copy()

        pd.testing.assert_frame_equal(output.remembered(name, measure, [run]), table)
        return len(calls)

    assert [measured(), measured(), measured("gradients"), measured()] == [1, 1, 2, 2]
    cells[0] = "profile = 'full'"
    assert [measured(), measured()] == [3, 3]
    run.record["seconds"] = 1
    assert [measured(), measured()] == [4, 4]
    shell.user_ns["finished"] = {0: SimpleNamespace(record={"weights": 1})}  # given to no measure
    assert [measured(), measured()] == [5, 5]
    monkeypatch.setattr(figures, "versions", lambda: {"torch": "0"})
    assert [measured(), measured()] == [6, 6]
    output.values = "of another yml"
    assert [measured(), measured()] == [7, 7]
    (kept,) = tmp_path.glob("measures/laptop/00_first/information-*")  # the older ones are gone
    kept.write_bytes(kept.read_bytes()[:-9])
    assert [measured(), measured()] == [8, 8]
    monkeypatch.setattr(figures, "get_ipython", lambda: None)  # nothing says what has changed
    assert [measured(), measured()] == [9, 10]


EVERY_TYPE = pd.DataFrame(
    {
        "whole": [1, -(2**62), 0],
        "share": [1 / 3, np.nan, 5e-324],
        "size": [np.inf, -0.0, -np.inf],
        "single": np.array([0.1, 1e-30, np.nan], np.float32),
        "reached": [True, False, True],
        "text": ["a, b", '"\n', "naïve"],
        "null-like": ["NaN", "null", ""],
        "text or none": ["a", None, "None"],
        "anything": pd.Series([None, 1, "1"], dtype=object),
        "number or none": pd.Series([None, 2.5, 2], dtype=object),
        "lists": [[1, 2.5], [], ["a", None]],
        "boxes": [np.int64(3), np.float32(0.5), True],
        "noise dimensions": np.arange(3, dtype=np.int32),
    }
)


@pytest.mark.parametrize("rows", [3, 0])
def test_what_is_remembered_comes_back_exactly(rows, repository, tmp_path, monkeypatch):
    """Types, every bit of a number, and text that looks like a missing value."""
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    shell = SimpleNamespace(user_ns={"In": []})
    monkeypatch.setattr(figures, "get_ipython", lambda: shell)
    table = EVERY_TYPE.iloc[:rows]
    output = figures.Output("laptop", "00_first")
    first = output.remembered("table", lambda: table)
    found = output.remembered("table", lambda: pytest.fail("not remembered"))
    pd.testing.assert_frame_equal(found, first, check_exact=True)
    pd.testing.assert_frame_equal(found, table, check_exact=True, check_index_type=False)
    for name in table.columns[[5, 6, 8, 9, 10]]:
        assert [*map(repr, found[name])] == [*map(repr, table[name])], name
    for name in table.columns[:5]:
        assert found[name].to_numpy().tobytes() == table[name].to_numpy().tobytes(), name


def test_random_bits_are_remembered_exactly(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    bits = np.random.default_rng(0).bytes(80_000)
    table = pd.DataFrame({"x": np.frombuffer(bits), "y": np.frombuffer(bits, np.float32)[:10_000]})
    found = figures.Output("laptop", "00_first").remembered("bits", lambda: table)
    for name in table:
        theirs, ours = table[name].to_numpy(), found[name].to_numpy()
        assert (np.isnan(theirs) == np.isnan(ours)).all()
        assert theirs[~np.isnan(theirs)].tobytes() == ours[~np.isnan(theirs)].tobytes()


def test_names_stay_in_their_folder(repository):
    for name in ("../x", "/tmp/x", "", ".", "..", "a/b", "x" * 300, "\0", None, 3):
        with pytest.raises(UserError, match="is no name of a notebook, figure or table"):
            figures.Output("laptop", name)
        with pytest.raises(UserError, match="without a path"):
            figures.Output("laptop", "00_first").table(name, pd.DataFrame())


def test_results_of_a_notebook_outside_a_batch_have_no_hash(repository):
    output = figures.Output("laptop", "00_first")
    output.record({})
    assert json.loads((output.folder / "results.json").read_text())["notebook"] is None
