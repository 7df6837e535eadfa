"""What a figure needs when it is saved: nothing cut, bars that fit their scale, notes below it."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator
from matplotlib.transforms import Bbox

BARS = "bars: 95 % t-interval of the mean over seeds"
LOG_BARS = "on a logarithmic axis, of the geometric mean"


def note(ax: plt.Axes, *texts: str) -> None:
    """Say what is drawn in ``ax``; ``framed`` writes each text once for the whole figure."""
    ax.notes = [*getattr(ax, "notes", []), *texts]


def fit_bars(ax: plt.Axes) -> None:
    """Make the bars of ``figures.dots`` those of the logarithms, if the x axis is logarithmic now.

    Each bar has them as ``by_logarithm``: mean, low, high; NaN, where a value is not positive.
    """
    bars = [bar for bar in ax.containers if hasattr(bar, "by_logarithm")]
    means = [bar.by_logarithm[0] for bar in bars]
    if not bars or ax.get_xscale() != "log" or np.isnan(means).any():
        return
    places = []
    for bar in bars:
        mark, _, (line,) = bar
        mean, low, high = bar.by_logarithm
        places += [(low, mark.get_ydata()[0]), (high, mark.get_ydata()[0])]
        mark.set_xdata([mean])
        line.set_segments([places[-2:]])
    ax.relim()  # forgets how far the bars reached before
    ax.update_datalim(places)
    ax.autoscale_view(scaley=False)
    if isinstance(chosen := ax.xaxis.get_major_locator(), FixedLocator):  # by ax.set_xticks
        ax.xaxis.set_view_interval(min(chosen.locs), max(chosen.locs))
    if BARS in getattr(ax, "notes", []):
        note(ax, LOG_BARS)


class RoomyLog(LogLocator):
    """Ticks of a y axis at 1, 2, 3 and 5 times the powers of ten; fewer, where they would touch."""

    def tick_values(self, vmin, vmax):
        ax = self.axis.axes
        decade = ax.bbox.height / ax.figure.dpi / max(np.log10(vmax / vmin), 1e-9)  # inches
        self.set_params(subs=(1, 2, 3, 5) if decade > 0.8 else (1, 3) if decade > 0.35 else (1,))
        return super().tick_values(vmin, vmax)


def framed(figure: plt.Figure, dpi: int) -> Bbox:
    """Find the layout once and for all, at the ``dpi`` of the file, and write the notes below it.

    Returns the box around everything, in inches.
    """
    figure.set_dpi(dpi)  # at another one, texts are not as wide
    for ax in figure.axes:
        fit_bars(ax)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)  # not to the larger box
    box = Bbox.union([figure.bbox_inches, figure.get_tightbbox().padded(0.04)])
    texts = "; ".join(dict.fromkeys(t for ax in figure.axes for t in getattr(ax, "notes", [])))
    if texts:
        texts = textwrap.fill(texts[0].upper() + texts[1:] + ".", round(18 * box.width))
        x, y = (box.x0 + 0.06, box.y0) / figure.get_size_inches()
        figure.text(x, y, texts, fontsize=8, color="0.35", va="top")
        box = Bbox.union([box, figure.get_tightbbox().padded(0.04)])
    return box
