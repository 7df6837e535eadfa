"""One style for all figures, and one folder for a figure and the numbers that it shows."""

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import display, get_ipython
from matplotlib.ticker import LogLocator
from pydantic_core import to_json

from dtlib.storage import atomic_write, cache_root, digest, repository, versions, write_text

# Colour, marker, line style of each starting point: they can be told apart without colour, too.
# The first three colours are paper A's; its random, (0.733, 0.737, 0.870), is darkened to be seen.
STYLES: dict[str, tuple[tuple[float, float, float], str, str]] = {
    "gpt2": ((0.372, 0.537, 0.537), "o", "-"),
    "igpt": ((0.627, 0.352, 0.470), "s", "-"),
    "random": ((0.53, 0.54, 0.78), "^", "-"),
    "random-matched": ((0.275, 0.290, 0.565), "v", "--"),
    "igpt-native": ((0.878, 0.545, 0.325), "D", "--"),
    "markov": ((0.25, 0.63, 0.83), "P", "-."),
    "iid": ((0.70, 0.62, 0.10), "X", ":"),
    "data": ((0.25, 0.25, 0.25), "", ":"),
}
for _ours, _theirs in (("language", "gpt2"), ("image", "igpt"), ("image-native", "igpt-native")):
    STYLES[_ours] = STYLES[_theirs]  # ours stands in the place of the paper's
COLOURS = {name: style[0] for name, style in STYLES.items()}


def use_style() -> None:
    """Set the style for this process: legible when a figure fills half a page."""
    sizes = {"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "lines.markersize": 5}
    boxes = {"axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "none"}
    layout = {"figure.figsize": (5.0, 3.4), "figure.constrained_layout.use": True}
    cycle = plt.cycler(color=list(dict.fromkeys(COLOURS.values())))
    plt.rcParams.update(sizes | boxes | layout | {"axes.prop_cycle": cycle, "pdf.fonttype": 42})


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low, high (...) of ``values`` (seeds, ...): 95 % bootstrap, of 3 seeds the range."""
    values = np.asarray(values, dtype=np.float64)
    seeds, mean = len(values), values.mean(axis=0)
    # How often each of 10,000 resamples draws each seed: one product gives all their means.
    draws = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=10_000)
    means = draws / seeds @ values.reshape(seeds, -1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0).reshape(2, *mean.shape)
    if seeds == 1:
        return mean, low * np.nan, high * np.nan
    return mean, np.minimum(low, mean), np.maximum(high, mean)  # rounding can part equal seeds


def span(values: np.ndarray, form: str = ".2f") -> str:
    """``interval`` of ``values`` (seeds,) as "mean [low, high]"; of one seed the value alone."""
    mean, low, high = interval(values)
    return f"{mean:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def sentence(text: str) -> None:
    """Print a paragraph in lines of at most 100 columns."""
    print(textwrap.fill(" ".join(text.split()), 100))


def band(ax: plt.Axes, x: np.ndarray, values: np.ndarray, label: str, colour=None) -> None:
    """Draw ``values`` (seeds, points) in the style of ``label``: mean, interval, each seed thin."""
    own, marker, line = STYLES.get(label, (None, "", "-"))
    mean, low, high = interval(values)
    style = {"color": colour or own, "marker": marker, "markevery": max(1, len(x) // 8)}
    colour = ax.plot(x, mean, line, label=label, **style)[0].get_color()
    ax.plot(x, np.transpose(values), line, color=colour, linewidth=0.6, alpha=0.5)
    ax.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def log_axis(ax: plt.Axes) -> None:
    """Make the y axis logarithmic, with numbers at 1, 2, 3 and 5 times the powers of ten."""
    ax.set_yscale("log", subs=[])
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}")


def alt_text(figure: plt.Figure, name: str) -> str:
    """Return what a figure shows in words: each panel's title and axes, then all labels."""
    panels, shown = [], []
    for ax in figure.axes:
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        panels.append(": ".join(filter(None, (ax.get_title(), axes))))
        shown += ax.get_legend_handles_labels()[1]
    parts = ["; ".join(dict.fromkeys(filter(None, panels))), ", ".join(dict.fromkeys(shown))]
    return ". ".join([name.replace("_", " ").capitalize(), *filter(None, parts)]) + "."


def of_task(name: str, task: str, tasks: list[str]) -> str:
    """A figure's name: ``name`` for the first of ``tasks``, ``name_task`` for the others."""
    return name if task == tasks[0] else f"{name}_{task}"


def notebook_hash(path: Path) -> str:
    """Hexadecimal SHA-256 over the sources of all code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return digest(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


class Output:
    """A notebook's folder of results; ``overrides``: settings that differ from the profile's."""

    def __init__(self, profile: str, notebook: str, overrides: dict | None = None):
        figures, chosen = (os.environ.get(f"DTLIB_{name}") for name in ("FIGURES", "OVERRIDES"))
        top = Path(figures, profile) if figures else repository() / "figures" / "mine"
        self.profile, self.folder = profile, top / notebook
        self.overrides = json.loads(chosen or "{}") | (overrides or {})
        # Now, before hours of training, in which somebody may edit the notebook.
        self.hash = notebook_hash(repository() / "notebooks" / f"{notebook}.ipynb")

    def remembered(self, name: str, measure: Callable, runs: Iterable = ()) -> pd.DataFrame:
        """The table of ``measure()``, index 0, 1, …, kept in the cache until something changes.

        That is: a cell executed so far, dtlib's code, a library, or one of the ``runs`` measured.
        Outside a notebook, where nothing says what a cell was, it is measured each time.
        """
        cells = getattr(get_ipython(), "user_ns", {}).get("In", time.time_ns())
        code, records = sorted(Path(__file__).parent.rglob("*.py")), [run.record for run in runs]
        key = digest(cells, *code, records, versions(), pd.__version__)[:12]
        path = cache_root() / "measures" / self.profile / self.folder.name / f"{name}-{key}.json"
        try:
            columns, types = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent, or damaged
            table = measure()
            # JSON keeps every digit of a number, and tells 1 from "1" and None.
            text = json.dumps([table.to_dict("list"), table.dtypes.astype(str).to_dict()])
            for old in path.parent.glob(f"{name}-*"):
                old.unlink(missing_ok=True)
            write_text(path, text)
            columns, types = json.loads(text)
        return pd.DataFrame({name: pd.Series(columns[name], dtype=types[name]) for name in types})

    def save(self, figure: plt.Figure, name: str, table: pd.DataFrame) -> None:
        """Write png (200 dpi), pdf and csv (the numbers shown), always the same bytes; show it."""
        figure.draw_without_rendering()  # the layout is found once, not for each file
        figure.set_layout_engine("none")
        for suffix, metadata in (("png", None), ("pdf", {"CreationDate": None})):
            with atomic_write(self.folder / f"{name}.{suffix}") as path:
                figure.savefig(path, format=suffix, dpi=200, metadata=metadata)
        write_text(self.folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        plt.close(figure)  # a notebook would draw it once more
        if (shell := get_ipython()) is not None and shell.has_trait("kernel"):
            image, width = str(self.folder / f"{name}.png"), round(96 * figure.get_figwidth())
            display.display(display.Image(image, width=width, alt=alt_text(figure, name)))

    def record(self, results: dict) -> None:
        """Write results.json: ``results`` (NaN as null), profile, overrides, versions, notebook."""
        about = {"profile": self.profile, "overrides": self.overrides, "notebook": self.hash}
        results = {**results, **about, "versions": versions()}
        text = to_json(results, inf_nan_mode="null", fallback=lambda value: value.tolist())
        ordered = json.dumps(json.loads(text), indent=1, sort_keys=True)
        write_text(self.folder / "results.json", ordered + "\n")
