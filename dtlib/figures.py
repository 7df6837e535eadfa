"""One style for all figures, and one folder for a figure and the numbers that it shows."""

import itertools
import json
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import display, get_ipython
from pydantic_core import to_json
from scipy import special

from dtlib import profiles
from dtlib.errors import UserError
from dtlib.layout import BARS, RoomyLog, fit_bars, framed, note
from dtlib.storage import (
    CODE,
    atomic_write,
    cache_root,
    code_digest,
    digest,
    repository,
    versions,
    write_text,
)
from dtlib.tasks import Task

# Colour, marker, line style of each starting point. Any two colours differ by ΔE >= 20 (CIE 1976)
# for full colour vision, deuteranopia and protanopia; marks tell them apart without colour.
STYLES: dict[str, tuple[tuple[float, float, float], str, str]] = {
    "gpt2": ((0.05, 0.52, 0.37), "o", "-"),
    "igpt": ((0.70, 0.22, 0.54), "s", "-"),
    "random": ((0.32, 0.45, 0.84), "^", "-"),
    "random-matched": ((0.16, 0.16, 0.49), "v", "--"),
    "igpt-native": ((0.70, 0.39, 0.14), "D", "--"),
    "markov": ((0.14, 0.66, 0.86), "P", "-."),
    "iid": ((0.77, 0.59, 0.00), "X", ":"),
    "language-shuffled": ((0.40, 0.67, 0.39), "<", "--"),
    "language-rotated": ((0.40, 0.27, 0.09), ">", "-."),
    "data": ((0.25, 0.25, 0.25), "", ":"),
}
ALIASES = {"language": "gpt2", "image": "igpt", "image-native": "igpt-native", "smollm2": "gpt2"}
ALIASES |= {f"smollm2-{how}": f"language-{how}" for how in ("shuffled", "rotated")}
STYLES |= {ours: STYLES[theirs] for ours, theirs in ALIASES.items()}
COLOURS = {name: style[0] for name, style in STYLES.items()}
# From top to bottom and from left to right, wherever the order is not part of the result.
ORDER = ("random", "random-matched", "language", "language-shuffled", "language-rotated", "image")
ORDER += ("image-native", "markov", "iid")
# Marks of the verdicts: they differ in shape and in filling.
VERDICTS = {
    "supported": {"marker": "o", "color": "0.15"},
    "undecided": {"marker": "o", "color": "0.6", "markerfacecolor": "none"},
    "not supported": {"marker": "x", "color": "0.15", "markeredgewidth": 1.8},
}


def use_style() -> None:
    """Set the style for this process: figures for a page 7 inches wide, tables with whole texts."""
    sizes = {"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "lines.markersize": 5}
    boxes = {"axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "none"}
    layout = {"figure.figsize": (5.0, 3.4), "figure.constrained_layout.use": True}
    plt.style.use("default")  # not what the user's own matplotlibrc says
    cycle = plt.cycler(color=list(dict.fromkeys(COLOURS.values())))
    plt.rcParams.update(sizes | boxes | layout | {"axes.prop_cycle": cycle, "pdf.fonttype": 42})
    pd.set_option("display.max_colwidth", None)


def t_interval(values: np.ndarray) -> tuple:
    """Mean of ``values`` (seeds, ...) and the ends of its 95 % t-interval, each of shape (...).

    Below three seeds the ends are NaN. This is the only interval in this repository.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds = len(values)
    mean = values.mean(axis=0) if seeds else np.nan
    if seeds < 3:
        return mean, mean * np.nan, mean * np.nan
    half = special.stdtrit(seeds - 1, 0.975) * values.std(axis=0, ddof=1) / seeds**0.5
    return mean, mean - half, mean + half


def span(values: np.ndarray, form: str = ".2f") -> str:
    """``t_interval`` of ``values`` (seeds,) as "mean [low, high]"; below three, the mean alone."""
    mean, low, high = t_interval(values)
    return f"{mean:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def sentence(text: str) -> None:
    """Print a paragraph in lines of at most 100 columns."""
    print(textwrap.fill(" ".join(text.split()), 100))


def look(name: str, **own) -> dict:
    """Colour and marker of a starting point as keywords for ax.plot; grey circles if unknown."""
    colour, marker, _ = STYLES.get(name, ("0.4", "o", "-"))
    return {"color": colour, "marker": marker, "linestyle": ""} | own


def in_order(names: Iterable[str]) -> list[str]:
    """Return ``names`` of starting points as ``ORDER`` has them; names that it lacks come last."""
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(
        names, key=lambda name: place.get(name.replace("smollm2", "language"), len(place))
    )


def dots(
    ax: plt.Axes,
    rows: dict[str, pd.DataFrame],
    against: str | None = None,
    within: tuple[float, float] = (-np.inf, np.inf),
    shown: tuple[float, float] | None = None,
) -> None:
    """Draw one line of marks for each of ``rows``: {label: table of seeds × starting points}.

    Large mark and bar: mean and 95 % t-interval over seeds; on a logarithmic axis, if all values
    are positive, the geometric mean and the interval of the logarithms. Small marks: the seeds.
    Bars end at the bounds ``within`` which the quantity lies. ``shown``: the ends of the x axis; a
    bar that leaves it ends in an arrowhead, beside its numbers. The first row is at the top.
    ``against``: a column; what is drawn are differences to it, seed by seed, beside a line at zero.
    NaN values are left out. ``{name: table[[name]]}`` gives one row a start.
    """
    for y, table in enumerate(rows.values()):
        if against:
            table = table.drop(columns=against).sub(table[against], axis=0)
        for i, name in enumerate(table):
            at, values = y + 0.7 * ((i + 0.5) / table.shape[1] - 0.5), table[name].dropna()
            mean, low, high = np.clip(exact := t_interval(values), *within)
            if not np.allclose(exact, (mean, low, high), equal_nan=True):
                note(ax, "bars are cut where the quantity ends")
            small = look(name, marker="|", markersize=7, alpha=0.6)
            inside = values[values.between(*shown)] if shown else values.clip(*within)
            ax.plot(inside, [at] * len(inside), **small)
            bar = ax.errorbar(mean, at, xerr=[[mean - low], [high - mean]], **look(name))
            if len(values):
                logarithms = t_interval(np.log(values.where(values > 0)))
                bar.by_logarithm = np.clip(np.exp(logarithms), *within)
            note(ax, *("ticks: seeds", BARS)[: max(0, len(values) - 1)])  # bars need three
            if shown and len(values):
                _beyond(ax, at, values, shown, name, alone=table.shape[1] == 1)
    fit_bars(ax)
    if shown:
        ax.set_xlim(shown)
    if against:
        zero(ax)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _beyond(
    ax: plt.Axes, y: float, values: pd.Series, shown: tuple, name: str, alone: bool
) -> None:
    """Mark where mean and interval of ``values`` leave the axis ``shown``; write their numbers.

    A filled arrowhead: the mean lies there. A hollow one: only the bar reaches there. Where several
    starts share a row (not ``alone``), numbers have their start's colour and stand in one line.
    """
    mean, low, high = t_interval(values)
    low, high = (mean, mean) if np.isnan(low) else (low, high)
    left_of, right_of = (low < shown[0], mean < shown[0]), (high > shown[1], mean > shown[1])
    for caret, x, (leaves, whole) in ((4, shown[0], left_of), (5, shown[1], right_of)):
        fill = {} if whole else {"markerfacecolor": "white"}
        if leaves:
            ax.plot(x, y, **look(name, marker=caret, clip_on=False, zorder=3) | fill)
            words = "filled arrowhead: bar and mean lie there"
            note(ax, words if whole else "hollow arrowhead: the bar goes on")
    text = _numbers(values, shown, bar=left_of[0] or right_of[0])
    if not text:
        return
    left = mean < sum(shown) / 2
    # Nothing is drawn where the words stand.
    free = not values.between(*shown).any() and (high < shown[0] or low > shown[1])
    place = {"ha": "left" if left else "right", "va": "center" if free else "bottom"}
    place["xytext"] = (10 if left else -10, 0 if free else 4)
    style = {"fontsize": 8, "color": "0.2", "textcoords": "offset points", "linespacing": 1}
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9}
    if free or not alone:
        text = text.replace("]\n", "]; ").replace("\n", " ")
    if not alone:
        style["color"] = look(name)["color"]
    ax.annotate(text, (shown[0] if left else shown[1], y), **place, **style)


def _numbers(values: pd.Series, shown: tuple, bar: bool) -> str:
    """Mean and interval, if the ``bar`` leaves the axis, and the seeds outside it, in two lines."""
    mean, low, high = t_interval(values)
    far = [f"{value:.0f}" for value in values if not shown[0] <= value <= shown[1]]
    words, interval = [], "" if np.isnan(low) else f"[{low:.0f}, {high:.0f}]"
    if 0 < len(far) < min(3, len(values)):
        words = [f"seeds at {', '.join(far)}" if len(far) > 1 else f"one seed at {far[0]}"]
    elif far and not bar:
        words = [f"{len(far)} seeds outside"]
    if bar:
        words = [f"{mean:.0f} {interval}".strip(), *words] if words else [f"{mean:.0f}", interval]
    return "\n".join(filter(None, words)).replace("-", "−")


def zero(ax: plt.Axes) -> None:
    """Draw the line at x = 0, where two things do not differ."""
    ax.axvline(0, color="0.4", linewidth=1, zorder=0)


def series(ax: plt.Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Draw mean and t-interval at each x, side by side: {starting point: table of seeds × x}."""
    everywhere = [x for table in tables.values() for x in table]
    apart = 0.025 * (max(everywhere) - min(everywhere))
    for i, (name, table) in enumerate(tables.items()):
        mean, low, high = np.transpose([t_interval(table[x].dropna()) for x in table])
        at = table.columns.to_numpy(float) + apart * (i - (len(tables) - 1) / 2)
        style = look(name, linestyle="-", linewidth=0.8)
        ax.errorbar(at, mean, yerr=[mean - low, high - mean], **style)
        if np.isfinite(low).any():
            note(ax, BARS)


def learning_curves(
    curves: pd.DataFrame, names: list[str], against: str, values: dict[str, str]
) -> plt.Figure:
    """Draw learning curves from the first epoch on, and how far apart they end.

    ``curves``: columns initialisation, seed, step, and each of ``values`` {column: label}, which
    gets a row of two panels. Left: the mean over seeds for each of ``names``; ``against``, the
    control, is thick. Right: the last step's differences to the control, as in ``dots``; the names
    of its rows, in colour, name the lines.
    """
    shown = [name for name in in_order(names) if name != against]
    height = 0.7 + len(values) * max(1.5, 0.6 + 0.26 * len(shown))
    shape = {"figsize": (7.0, height), "width_ratios": (1, 1.2), "squeeze": False}
    figure, axes = plt.subplots(len(values), 2, **shape)
    trained = curves[curves.step > 0]
    for (left, right), (value, label) in zip(axes, values.items(), strict=True):
        wide = trained.pivot(index="step", columns=["initialisation", "seed"], values=value)
        for name in (against, *shown):
            style = {"linestyle": STYLES.get(name, ("", "", "-"))[2]}
            style |= {"linewidth": 3 if name == against else 1.2, "markersize": 4}
            left.plot(wide[name].mean(axis=1), **look(name, **style))
        left.set_ylabel(label)
        last = wide.iloc[-1].unstack("initialisation")
        dots(right, {name: last[[name, against]] for name in shown}, against)
        better = "← better" if "error" in label else "better →"
        right.set_xlabel(f"last {label}, minus {against} ({better})")
        right.locator_params(axis="x", nbins=5)
        right.yaxis.tick_right()
        for text, name in zip(right.get_yticklabels(), shown, strict=True):
            text.set_color(look(name)["color"])
    axes[-1, 0].set_xlabel("training step")
    note(axes[0, 0], f"left: means over seeds, the thick line is {against}")
    return figure


def arrow(ax: plt.Axes, before: tuple, after: tuple, name: str) -> None:
    """Draw an arrow between two points in the colour of a starting point, its mark at the end."""
    line = {"arrowstyle": "-|>", "color": look(name)["color"], "shrinkA": 0, "shrinkB": 3}
    ax.annotate("", after, before, arrowprops=line)
    ax.plot(*before, **look(name, markerfacecolor="none", markersize=4))
    ax.plot(*after, **look(name))


def reference(ax: plt.Axes, y: float, label: str = "", linestyle: str = ":") -> None:
    """Draw a line at ``y``, by default a dotted one, with its label above its right end."""
    ax.axhline(y, color=COLOURS["data"], linestyle=linestyle, linewidth=1)
    at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    ax.annotate(label, (1, y), (0, 2), ha="right", va="bottom", fontsize=8, **at)


def reference_x(ax: plt.Axes, x: float, label: str = "", linestyle=":", side="right") -> None:
    """Draw a line at ``x``, by default a dotted one, with its label at that side of its top."""
    ax.axvline(x, color=COLOURS["data"], linestyle=linestyle, linewidth=1)
    at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    place, end = ((3, 0), "left") if side == "right" else ((-3, 0), "right")
    ax.annotate(label, (x, 1), place, ha=end, va="top", fontsize=8, **at)


def strip(ax: plt.Axes, words: pd.DataFrame) -> None:
    """Draw the mark of each verdict in a table (rows × columns); of other words none."""
    for (y, x), word in np.ndenumerate(words.to_numpy()):
        if word in VERDICTS:
            ax.plot(x, y, linestyle="", **VERDICTS[word])
    ax.set_xticks(range(words.shape[1]), words.columns)
    ax.set_yticks(range(words.shape[0]), words.index)
    ax.set(xlim=(-0.5, words.shape[1] - 0.5), ylim=(words.shape[0] - 0.5, -0.5))
    ax.tick_params(length=0)


def name_marks(figure: plt.Figure, names: Iterable[str], marks: dict | None = None) -> None:
    """Write the names beside their marks above the panels: of starting points, or of ``marks``."""
    names = list(names) if marks else in_order(names)
    styles = {name: {"linestyle": ""} | (marks[name] if marks else look(name)) for name in names}
    handles = [plt.Line2D([], [], label=name, **style) for name, style in styles.items()]
    columns = -(-len(handles) // -(-len(handles) // 4)) if handles else 1  # five: three and two
    by_column = [handle for i in range(columns) for handle in handles[i::columns]]  # read by row
    figure.legend(handles=by_column, loc="outside upper center", ncols=columns)


def tokens(
    ax: plt.Axes, returns_to_go: np.ndarray, states: np.ndarray, actions: np.ndarray
) -> None:
    """Draw the first steps of an episode as the tokens that a model reads.

    returns_to_go (n,), states (n, S), actions (n, A): each token is a column of its numbers, blue
    below zero and red above; the return-to-go is written out.
    """
    end = np.ceil(max(abs(states).max(), abs(actions).max()))
    for step, parts in enumerate(zip(returns_to_go[:, None], states, actions, strict=True)):
        for i, (letter, values) in enumerate(zip((r"\hat{R}", "s", "a"), parts, strict=True)):
            x = 4 * step + 1.2 * i
            place = {"extent": (x, x + 0.8, -len(values) / 2, len(values) / 2), "aspect": "auto"}
            if i:
                ax.imshow(values[:, None], cmap="coolwarm", vmin=-end, vmax=end, **place)
            ax.text(x + 0.4, -states.shape[1] / 2 - 1, f"${letter}_{{{step + 1}}}$", ha="center")
        ax.text(4 * step + 0.4, 0, f"{returns_to_go[step]:.0f}", ha="center", va="center")
    edge = states.shape[1] / 2
    ax.set(xlim=(-0.4, 4 * len(states) - 0.4), ylim=(-edge - 1.5, edge + 0.5))
    ax.axis("off")


def render(task: Task, states: np.ndarray, pixels: int = 160, **options) -> list[np.ndarray]:
    """Return a frame (height, width, 3) for each of ``states`` (n, S), unscaled observations.

    ``options`` go to the environment, such as ``camera_name``. Where this machine cannot draw off
    screen there are no frames, and a sentence says so.
    """
    try:
        options = {"render_mode": "rgb_array", "height": pixels, "width": pixels} | options
        env = task.make_environment(**options)
        env.reset(seed=0)
        positions, frames = env.unwrapped.model.nq - 1, []
        for state in states.astype(float):  # joint positions without the horizontal one, velocities
            env.unwrapped.set_state(np.append(0.0, state[:positions]), state[positions:])
            frames.append(env.render()[pixels // 4 : -pixels // 12, pixels // 5 : -pixels // 5])
        env.close()
        return frames
    except Exception as error:  # renderers raise kinds of their own
        sentence(f"There are no frames, because this machine cannot draw off screen ({error}).")
        return []


def film_strip(
    ax: plt.Axes, task: Task, states: np.ndarray, count: int = 8, pixels: int = 160
) -> np.ndarray:
    """Draw ``count`` moments of an episode's ``states`` (n, S), the first and the last among them.

    Returns their steps, (count,). Where no frame can be drawn, the axes stay empty.
    """
    steps = np.linspace(0, len(states) - 1, count).round().astype(int)
    frames, gap = render(task, states[steps], pixels), ((0, 0), (3, 3), (0, 0))
    ax.set(xticks=[], yticks=[])
    if frames:
        width = frames[0].shape[1] + 6
        ax.imshow(np.hstack([np.pad(frame, gap, constant_values=255) for frame in frames]))
        ax.set_xticks(width * (np.arange(count) + 0.5), steps)
        ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return steps


def explore(show: Callable, **choices) -> None:
    """Let the reader move controls: ``show`` draws anew for each of ``choices``, as in interact.

    The parameters' defaults are the first picture, in a batch the only one.
    """
    if "DTLIB_FIGURES" in os.environ:
        show()
        return
    controls = ipywidgets.interactive(show, **choices)
    for control in controls.children:
        if control.has_trait("continuous_update"):
            control.continuous_update = False
    display.display(controls)


def lines(ax: plt.Axes, table: pd.DataFrame) -> None:
    """Draw each column of a table over its index; its name stands at the end of its line."""
    ends = table.ffill().iloc[-1].rank()
    for name, rank in ends.items():
        line, colour = table[name].dropna(), look(name)["color"]
        ax.plot(line, color=colour, linestyle=STYLES.get(name, ("", "", "-"))[2])
        va = "top" if rank == 1 else "bottom" if rank == len(ends) else "center"
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": va, "annotation_clip": False}
        ax.annotate(name, (line.index[-1], line.iloc[-1]), color=colour, **at)


def log_axis(ax: plt.Axes) -> None:
    """Make the y axis logarithmic, with as many round numbers as have room."""
    ax.set_yscale("log", subs=[])
    ax.yaxis.set(major_locator=RoomyLog(), major_formatter="{x:g}")


def alt_text(figure: plt.Figure, name: str) -> str:
    """Return what a figure shows in words: its panels' titles and axes, rows, names and notes."""
    panels, rows, shown, notes = [figure.get_supylabel(), figure.get_supxlabel()], [], [], []
    for ax in figure.axes:
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        panels.append(": ".join(filter(None, (ax.get_title(), axes))))
        rows += [text.get_text() for text in ax.get_yticklabels()]
        shown += ax.get_legend_handles_labels()[1]
        notes += getattr(ax, "notes", [])
    shown += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    rows = [row for row in rows if re.search("[A-Za-z]", row)]  # words, not the numbers of a scale
    groups = ("; ".join, panels), (", ".join, rows), (", ".join, shown), ("; ".join, notes)
    parts = [join(dict.fromkeys(filter(None, texts))) for join, texts in groups]
    words = ". ".join([name.replace("_", " ").capitalize(), *filter(None, parts)]) + "."
    return " ".join(re.sub(r"[$\\{}]", "", words).split())


def of_task(name: str, task: str, tasks: list[str]) -> str:
    """A figure's name: ``name`` for the first of ``tasks``, ``name_task`` for the others."""
    return name if task == tasks[0] else f"{name}_{task}"


def plain(name: object) -> str:
    """Return ``name``. Raises UserError if it could lead to another folder than its own."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,79}", name):
        what = f"{name!r} is no name of a notebook, figure or table"
        raise UserError(f"{what}: take up to 80 letters, digits, _, - and dots, without a path.")
    return name


class Output:
    """A notebook's folder of results; ``overrides``: settings that differ from the profile's."""

    def __init__(self, profile: str, notebook: str, overrides: dict | None = None):
        figures, chosen = (os.environ.get(f"DTLIB_{name}") for name in ("FIGURES", "OVERRIDES"))
        # The batch says which notebook it runs, by which values; a copy must not pass as another.
        running = os.environ.get("DTLIB_NOTEBOOK") or notebook
        if running != notebook:
            text = f"Notebook {running} would write the results of {notebook}"
            raise UserError(f"{text}: give Output its own name, or move the copy away.")
        self.values = profiles.values_digest(profile)
        if (os.environ.get("DTLIB_VALUES") or self.values) != self.values:
            raise UserError(f"Profile {profile} changed since the batch began: run it again.")
        top = Path(figures, profile) if figures else repository() / "figures" / "mine"
        self.profile, self.folder = profile, top / plain(notebook)
        self.overrides = json.loads(chosen or "{}") | (overrides or {})
        # Only a batch knows what runs; the results of another notebook are never a profile's.
        self.hash = os.environ.get("DTLIB_HASH")
        self.tables, self.begun = {}, False  # the digest of each csv; whether one was written

    def remembered(self, name: str, measure: Callable, runs: Iterable = ()) -> pd.DataFrame:
        """The table of ``measure()``, index 0, 1, …, kept in the cache until something changes.

        That is: a cell executed so far, dtlib's files, a profile's values, a library, one of the
        ``runs`` measured, or one in a dictionary of the notebook: its record tells of all else.
        Outside a notebook, where nothing says what a cell was, it is measured each time. Changes in
        modules of your own, which a cell imports, are not seen: give such a measure another name.
        """
        space = getattr(get_ipython(), "user_ns", {})
        cells = space.get("In", time.time_ns())
        groups = [value.values() for value in space.values() if isinstance(value, dict)]
        records = [getattr(run, "record", None) for run in itertools.chain(runs, *groups)]
        records = [record for record in records if isinstance(record, dict)]
        policies = filter(Path.is_file, Path(__file__).parent.glob("policies/**/*"))
        parts = cells, self.values, CODE, *sorted(policies), records, versions(), pd.__version__
        key = digest(*parts)[:12]
        path = cache_root() / "measures" / self.profile / self.folder.name / f"{name}-{key}.json"
        try:
            content, code = json.loads(path.read_text(encoding="utf-8"))
            if code != digest(content):
                raise ValueError(f"{path} is damaged")
        except (OSError, ValueError, TypeError):  # absent, or damaged
            table = measure()
            # JSON keeps every digit of a number, and tells 1 from "1" and None.
            content = json.dumps([table.to_dict("list"), table.dtypes.astype(str).to_dict()])
            if code_digest() == CODE:  # else some of it may be newer than what was imported first
                for old in path.parent.glob(f"{name}-*"):
                    old.unlink(missing_ok=True)
                write_text(path, json.dumps([content, digest(content)]))
        columns, types = json.loads(content)
        return pd.DataFrame({name: pd.Series(columns[name], dtype=types[name]) for name in types})

    def save(self, figure: plt.Figure, name: str, table: pd.DataFrame) -> None:
        """Write png (200 dpi), pdf and csv (the numbers shown), always the same bytes; show it."""
        self._begin()
        box = framed(figure, dpi=200)
        for suffix, metadata in (("png", None), ("pdf", {"CreationDate": None})):
            with atomic_write(self.folder / f"{plain(name)}.{suffix}") as path:
                figure.savefig(path, format=suffix, dpi=200, metadata=metadata, bbox_inches=box)
        self.table(name, table)
        plt.close(figure)  # a notebook would draw it once more
        if (shell := get_ipython()) is not None and shell.has_trait("kernel"):
            image, width = str(self.folder / f"{name}.png"), round(96 * box.width)
            display.display(display.Image(image, width=width, alt=alt_text(figure, name)))

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Write a csv for numbers that are better read than seen."""
        self._begin()
        text = table.to_csv(index=False, lineterminator="\n")
        write_text(self.folder / f"{plain(name)}.csv", text)
        self.tables[name] = digest(text)

    def _begin(self) -> None:
        """Before the first file is written, remove what tells where the older ones come from.

        So they never pass for those of this run, if it is interrupted.
        """
        if not self.begun:
            self.begun = True
            for name in ("results.json", "figures.json"):
                (self.folder / name).unlink(missing_ok=True)

    def record(self, results: dict) -> None:
        """Write results.json: ``results`` (NaN as null), where they come from, and checksums."""
        self._begin()
        about = {"profile": self.profile, "overrides": self.overrides, "notebook": self.hash}
        results = {**results, **about, "profile_values": self.values, "versions": versions()}
        results["tables"] = self.tables
        text = to_json(results, inf_nan_mode="null", fallback=lambda value: value.tolist())
        results = json.loads(text)
        ordered = json.dumps(results | {"checksum": digest(results)}, indent=1, sort_keys=True)
        write_text(self.folder / "results.json", ordered + "\n")
