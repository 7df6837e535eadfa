"""One style for all figures, and one way to keep a figure together with its numbers."""

import contextlib
import hashlib
import json
import os
import pickle
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.ticker import LogLocator
from pydantic_core import to_json

from dtlib.errors import UserError, atomic_write, cache_root, versions

T = TypeVar("T")

# Colour, marker, line style; paper A's colours for its three, and for ours that stand in their places; all can be told apart
# without colour.
STYLES: dict[str, tuple[tuple[float, float, float], str, str]] = {
    "gpt2": ((0.372, 0.537, 0.537), "o", "-"),
    "igpt": ((0.627, 0.352, 0.470), "s", "-"),
    "random": ((0.53, 0.54, 0.78), "^", "-"),  # the paper's (0.733, 0.737, 0.870), darkened: on white it is hardly visible
    "random-matched": ((0.275, 0.290, 0.565), "v", "--"),
    "igpt-native": ((0.878, 0.545, 0.325), "D", "--"),
    "markov": ((0.25, 0.63, 0.83), "P", "-."),
    "iid": ((0.70, 0.62, 0.10), "X", ":"),
    "data": ((0.25, 0.25, 0.25), "", ":"),
}
STYLES |= {ours: STYLES[theirs] for ours, theirs in (("language", "gpt2"), ("image", "igpt"), ("image-native", "igpt-native"))}
COLOURS = {name: style[0] for name, style in STYLES.items()}


def repository() -> Path:
    """The repository's root: from the current folder up, the first one with pyproject.toml and notebooks/."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise UserError(f"{Path.cwd()} is not inside the repository: go to the folder with pyproject.toml and notebooks/.")


def use_style() -> None:
    """Set the style for this process: legible when the figure fills half a page, no box, no overlap."""
    plt.rcParams.update({
        "figure.figsize": (5.0, 3.4), "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "none", "legend.fontsize": 9,
        "axes.prop_cycle": plt.cycler(color=list(dict.fromkeys(COLOURS.values()))), "lines.markersize": 5, "pdf.fonttype": 42})


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of ``values`` (seeds, ...) over seeds and its 95 % percentile-bootstrap interval: mean, low, high: (...).

    One seed gives NaN ends; three give their range, which holds the centre of a symmetric distribution 75 times in 100.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, mean = len(values), values.mean(axis=0)
    # How often each of 10,000 resamples draws each seed: one product gives all their means at once.
    draws = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=10_000)
    ends = np.percentile(draws / seeds @ values.reshape(seeds, -1), [2.5, 97.5], axis=0).reshape(2, *mean.shape)
    low, high = np.minimum(ends[0], mean), np.maximum(ends[1], mean)  # of equal seeds, rounding can set them apart
    return mean, *((low, high) if seeds > 1 else ends * np.nan)


def span(values: np.ndarray, form: str = ".2f") -> str:
    """``interval`` of ``values`` (seeds,) in words, "mean [low, high]"; of one seed the value alone."""
    mean, low, high = interval(values)
    return f"{mean:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def say(text: str) -> None:
    """Print a paragraph in lines that fit the screen."""
    print(textwrap.fill(" ".join(text.split()), 110))


def band(ax: plt.Axes, x: np.ndarray, values: np.ndarray, label: str, colour: object = None) -> None:
    """Draw ``values`` (seeds, points) over ``x`` (points,): their mean, its 95 % interval, each seed as a thin line."""
    known, marker, line = STYLES.get(label, (None, "", "-"))  # its own, except where another ``colour`` is given
    mean, low, high = interval(values)
    (drawn,) = ax.plot(x, mean, line, color=colour or known, marker=marker, label=label, markevery=max(1, len(x) // 8))
    ax.plot(x, np.transpose(values), line, color=drawn.get_color(), linewidth=0.6, alpha=0.5)
    ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.25, linewidth=0)


def log_axis(ax: plt.Axes) -> None:
    """Make the y axis logarithmic, with numbers at 1, 2, 3 and 5 times the powers of ten."""
    ax.set_yscale("log", subs=[])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")


def of_task(name: str, task: str, tasks: list[str]) -> str:
    """What a figure that every task has is called: ``name`` for the first of ``tasks``, ``name_task`` for the others."""
    return name if task == tasks[0] else f"{name}_{task}"


class Output:
    """A notebook's results, in ``figures/<profile>/<notebook>`` (or ``DTLIB_FIGURES`` in the place of ``figures``)."""

    def __init__(self, profile: str, notebook: str):
        self.profile = profile
        self.folder = Path(os.environ.get("DTLIB_FIGURES") or repository() / "figures") / profile / notebook

    def remembered(self, name: str, measure: Callable[[], T], runs: Iterable = ()) -> T:
        """What ``measure()`` returns, kept in the cache folder; measured again once anything differs that may matter.

        That is: the cells executed so far, this one included; dtlib's code; a library; one of the ``runs`` that it looks at.
        """
        cells = get_ipython().user_ns["In"]
        code = [path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py"))]
        about = [cells, code, versions(), pd.__version__, [run.record for run in runs]]
        place = cache_root() / "measures" / self.profile / self.folder.name
        path = place / f"{name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}.pickle"
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            return pickle.loads(path.read_bytes())
        found = measure()
        for old in place.glob(f"{name}-*"):
            old.unlink(missing_ok=True)
        with atomic_write(path) as file:
            file.write_bytes(pickle.dumps(found))
        return found

    def save(self, figure: plt.Figure, name: str, table: pd.DataFrame) -> None:
        """Write ``name``.png (200 dpi), .pdf and .csv (the numbers shown), the same bytes for the same figure; show it."""
        figure.draw_without_rendering()  # the layout is found once, not for each file
        figure.set_layout_engine("none")
        for suffix in ("png", "pdf"):
            with atomic_write(self.folder / f"{name}.{suffix}") as path:  # without the date that a PDF would carry
                figure.savefig(path, dpi=200, metadata={"CreationDate": None} if suffix == "pdf" else None)
        with atomic_write(self.folder / f"{name}.csv") as path:
            table.to_csv(path, index=False, lineterminator="\n")
        plt.close(figure)
        if (shell := get_ipython()) is not None and shell.has_trait("kernel"):  # a notebook would draw it once more
            display(Image(str(self.folder / f"{name}.png"), width=round(96 * figure.get_figwidth())))

    def record(self, results: dict) -> None:
        """Write results.json: ``results`` (numbers at full precision, NaN as null), the profile, the versions."""
        overrides = json.loads(os.environ.get("DTLIB_OVERRIDES", "{}"))
        about = {"profile": self.profile, "overrides": overrides, "versions": versions()}
        plain = json.loads(to_json({**results, **about}, inf_nan_mode="null", fallback=lambda value: value.tolist()))
        with atomic_write(self.folder / "results.json") as path:
            path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
