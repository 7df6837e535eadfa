"""Draw figures/diagram.png, the picture of the model in README.md.

python scripts/draw_diagram.py
"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from dtlib.figures import STYLES, use_style
from dtlib.storage import repository

# Inches and points. A page column is 3.5 inches wide: there, 10 points become 7.
WIDTH, HEIGHT, POINTS = 5.0, 4.16, 10
LEFT, RIGHT = 0.42, 3.42  # sides of the model
KINDS = {"return": "#e4e4e4", "state": "#9ccbee", "action": "#f7dc6f"}  # colours of tokens
GROUPS = {"1": 0.45, "2": 1.40, "K": 2.51}  # left side of each step's three tokens
TOKEN, PITCH, HIGH = 0.26, 0.31, 0.30  # a token's width, their distance, their height
DARK = "#333333"
ARROW = {"arrowstyle": "-|>,head_width=0.18,head_length=0.32", "color": DARK, "linewidth": 0.9}


def box(ax, x, y, width, height, text="", colour="white", **style):
    """Draw a box with rounded corners and ``text`` in its middle."""
    style = {"edgecolor": DARK, "linewidth": 0.9} | style
    shape = "round,pad=0,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, **style))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.15)


def arrow(ax, start, end, **style):
    """Draw an arrow from ``start`` to ``end``, both (x, y)."""
    ax.annotate("", end, start, arrowprops=ARROW | {"shrinkA": 0, "shrinkB": 0} | style)


def tokens(ax, y):
    """Draw the tokens of the steps 1, 2 and K; the last action is not read."""
    for step, left in GROUPS.items():
        for i, (symbol, kind) in enumerate(zip(("\\hat R", "s", "a"), KINDS, strict=True)):
            x, unread = left + i * PITCH, (step, kind) == ("K", "action")
            style = {"linestyle": (0, (2, 2)), "edgecolor": "#888888"} if unread else {}
            colour = "white" if unread else KINDS[kind]
            box(ax, x, y, TOKEN, HIGH, f"${symbol}_{step}$", colour, **style)
            if not unread:
                arrow(ax, (x + TOKEN / 2, y + HIGH), (x + TOKEN / 2, y + HIGH + 0.22))
        ax.text(left + PITCH + TOKEN / 2, y - 0.14, f"step ${step}$", ha="center", va="center")
    ax.text(2.395, y + HIGH / 2, "…", ha="center", va="center")


def blocks(ax, y, step=0.31):
    """Draw the blocks and, beside them, the starting points that fill them with weights."""
    names = ("block 0: causal attention, MLP", "block 1", "⋮", "block $L-1$, then LayerNorm")
    for i, name in enumerate(names):
        if name == "⋮":
            ax.text((LEFT + RIGHT) / 2, y + i * step + 0.13, name, ha="center", va="center")
        else:
            box(ax, LEFT, y + i * step, RIGHT - LEFT, 0.26, name, "#f4f4f4")
    top = y + 3 * step + 0.26
    ax.plot([RIGHT + 0.07, RIGHT + 0.13, RIGHT + 0.13, RIGHT + 0.07], [y, y, top, top], color=DARK)
    ax.text(RIGHT + 0.22, top - 0.04, "starting weights", weight="bold", va="center")
    shown = {"random": "random", "language": "language", "image": "image", "markov": "Markov chain"}
    for i, (key, name) in enumerate(shown.items()):
        colour, marker, _ = STYLES[key]
        ax.plot(RIGHT + 0.30, top - 0.29 - 0.235 * i, marker, color=colour, markersize=7)
        ax.text(RIGHT + 0.43, top - 0.29 - 0.235 * i, name, va="center")
    return top


def draw():
    """Return the figure. The data flow from the bottom to the top."""
    use_style()
    plt.rcParams["font.size"] = POINTS
    figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="none")
    ax = figure.add_axes([0, 0, 1, 1], xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    middle, wide = (LEFT + RIGHT) / 2, RIGHT - LEFT
    tokens(ax, 0.35)
    box(ax, LEFT, 0.87, wide, 0.50)
    text = "linear embedding of each kind,\nLayerNorm, time-step embedding"
    ax.text(middle, 1.12, text, ha="center", va="center", linespacing=1.15)
    arrow(ax, (middle, 1.37), (middle, 1.62))
    top = blocks(ax, 1.62)
    head = top + 0.36
    box(ax, LEFT, head, wide, 0.36, r"action head: $\hat a = \tanh(W_a^{\!\top} h)$")
    for step, left in GROUPS.items():
        x = left + PITCH + TOKEN / 2  # above the state token
        arrow(ax, (x, top), (x, head))
        ax.text(x + 0.06, (top + head) / 2 - 0.02, f"$h_{step}$", va="center")
        arrow(ax, (x, head + 0.36), (x, head + 0.62))
        box(ax, x - TOKEN / 2, head + 0.62, TOKEN, HIGH, rf"$\hat a_{step}$", KINDS["action"])
    ax.text(2.395, head + 0.77, "…", ha="center", va="center")
    # The released action head has no weights of its own.
    ax.plot([LEFT, 0.28, 0.28], [1.12, 1.12, head + 0.18], color=DARK, linestyle=(0, (3, 2)))
    arrow(ax, (0.28, head + 0.18), (LEFT, head + 0.18))
    ax.text(0.14, (1.12 + head + 0.18) / 2, "the same $W_a$", rotation=90, va="center", ha="center")
    notes = {
        0.18: ("$a$", "action"),
        0.39: ("$s$", "state"),
        0.61: (r"$\hat R$", "return-to-go"),
        1.12: ("", "starts random"),
        head + 0.77: (r"$\hat a_K$", "moves the robot"),
    }
    for y, (symbol, text) in notes.items():
        ax.text(RIGHT + 0.12, y, symbol, va="center_baseline")
        ax.text(RIGHT + (0.38 if symbol else 0.12), y, text, va="center_baseline")
    return figure


if __name__ == "__main__":
    draw().savefig(repository() / "figures" / "diagram.png", dpi=300)
