"""Draw the picture of the method: a routing mask, and how it routes two tokens.

python docs/pictures/routing.py --output docs/pictures/routing.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

NUM_EXPERTS = 8
FREQUENT, RARE, HIDDEN, INK, CHOSEN = "#2f6fb0", "#d98200", "#ececec", "#202124", "#1f8a4c"

# Token, share of the text in percent, visible experts (from 1 on).
TOKENS = [
    ("the", 5.1, (1, 3, 4, 7)),
    ("of", 3.0, (2, 3, 5, 8)),
    ("in", 2.2, (1, 4, 6, 8)),
    ("harbour", 0.02, (6,)),
    ("quartz", 0.004, (2,)),
    ("okapi", 0.001, (5,)),
]
NUM_FREQUENT = 3
# Router logits of one occurrence of the first and of the last token, for all experts.
LOGITS = {"the": (0.9, 1.9, 1.2, 2.1, 0.6, 1.6, 0.5, 1.1), "okapi": (1.4, 0.5, 1.8, 0.9, 1.1, 0.6, 2.0, 1.3)}


def draw_mask(axes: Axes) -> None:
    """Draw the visible experts of each token: one row a token, one column an expert."""
    for row, (token, share, visible) in enumerate(TOKENS):
        y = len(TOKENS) - 1 - row - (0.6 if row >= NUM_FREQUENT else 0)
        color = FREQUENT if row < NUM_FREQUENT else RARE
        axes.text(-2.4, y, token, ha="right", va="center", family="monospace", fontsize=12, color=INK)
        axes.text(-0.75, y, f"{share} %", ha="right", va="center", fontsize=10, color=INK)
        for expert in range(1, NUM_EXPERTS + 1):
            fill = color if expert in visible else HIDDEN
            axes.add_patch(Rectangle((expert - 1.44, y - 0.4), 0.88, 0.8, facecolor=fill, edgecolor="none"))
    top = len(TOKENS) - 0.3
    axes.text(-2.4, top, "token", ha="right", fontsize=10, color=INK)
    axes.text(-0.75, top, "share", ha="right", fontsize=10, color=INK)
    for expert in range(1, NUM_EXPERTS + 1):
        axes.text(expert - 1, top, f"$E_{expert}$", ha="center", fontsize=11, color=INK)
    axes.text(NUM_EXPERTS - 0.3, 4, "frequent:\nsee several\nexperts", va="center", fontsize=11, color=FREQUENT)
    axes.text(NUM_EXPERTS - 0.3, 0.4, "rare:\nsee one", va="center", fontsize=11, color=RARE)
    axes.set_title("Before training: a mask fixes which experts each token sees", fontsize=13, color=INK)
    axes.set_xlim(-4.7, NUM_EXPERTS + 2.4)
    axes.set_ylim(-1.3, len(TOKENS) + 0.2)
    axes.axis("off")


def draw_routing(axes: Axes) -> None:
    """Draw how the router chooses for one frequent and one rare token."""
    draw_token(axes, y=2.6, token="the", visible=TOKENS[0][2], color=FREQUENT, text="router chooses\namong four")
    draw_token(axes, y=0.0, token="okapi", visible=TOKENS[-1][2], color=RARE, text="no choice:\nweight is 1")
    axes.set_title("In every layer: the router chooses among those only", fontsize=13, color=INK)
    axes.set_xlim(-4.7, NUM_EXPERTS + 2.4)
    axes.set_ylim(-0.75, 4.75)
    axes.axis("off")


def draw_token(axes: Axes, y: float, token: str, visible: tuple[int, ...], color: str, text: str) -> None:
    """Draw one token, its logits as bars above the experts, and the expert that gets the token."""
    box = FancyBboxPatch(
        (-4.4, y + 0.25), 2.1, 0.7, boxstyle="round,pad=0.08", facecolor="white", edgecolor=color, lw=2
    )
    axes.add_patch(box)
    axes.text(-3.35, y + 0.6, token, ha="center", va="center", family="monospace", fontsize=12, color=INK)
    arrow = FancyArrowPatch((-2.1, y + 0.6), (-0.7, y + 0.6), arrowstyle="-|>", mutation_scale=16, color=color, lw=2)
    axes.add_patch(arrow)
    axes.text(-1.4, y + 0.85, "$z = W\\,h$", ha="center", fontsize=11, color=INK)
    chosen = max(visible, key=lambda expert: LOGITS[token][expert - 1])
    for expert in range(1, NUM_EXPERTS + 1):
        x, is_visible = expert - 1, expert in visible
        # Invisible experts have the logit minus infinity: an outline without a fill shows what the router would say.
        height = 0.62 * LOGITS[token][expert - 1]
        style = (
            {"facecolor": color, "edgecolor": color} if is_visible else {"facecolor": "none", "edgecolor": "#b5b5b5"}
        )
        axes.add_patch(Rectangle((x - 0.3, y + 0.2), 0.6, height, linestyle="-" if is_visible else ":", **style))
        if not is_visible:
            axes.text(x, y + 0.26, r"$-\infty$", ha="center", fontsize=9, color="#707070")
        edge = CHOSEN if expert == chosen else "#c8c8c8"
        axes.add_patch(
            Rectangle(
                (x - 0.4, y - 0.55), 0.8, 0.55, facecolor="white", edgecolor=edge, lw=3 if expert == chosen else 1
            )
        )
        color_of_name = INK if is_visible else "#9a9a9a"
        axes.text(x, y - 0.28, f"$E_{expert}$", ha="center", va="center", fontsize=11, color=color_of_name)
    axes.text(NUM_EXPERTS - 0.3, y + 0.75, text, va="center", fontsize=11, color=color)
    axes.text(NUM_EXPERTS - 0.3, y - 0.28, f"$E_{chosen}$ gets the token", va="center", fontsize=11, color=CHOSEN)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    output = parser.parse_args().output
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.4, 4.2), layout="constrained", facecolor="white")
    draw_mask(left)
    draw_routing(right)
    # Without the version of matplotlib in the file, the same picture has the same bytes everywhere.
    figure.savefig(output, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
