"""Draws the plots of a run as SVG images that contain everything they need."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from maskmoe.run_report.history import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#1f4e9c", "#d9822b", "#2a9d5c", "#8e5bb5", "#c0392b", "#5aa9e6", "#b08d57", "#6b6b6b")
_LAYER = re.compile(r"moe/expert_load_max_over_mean_layer_(\d+)")
_MOST_COLUMNS = 200  # of the load's map
_GIB = 2**30


@dataclass(frozen=True)
class Plot:
    """One plot of the page.

    Attributes:
        title: a heading.
        caption: what the plot shows, as a sentence.
        image: the plot as a `data:` URI.
    """

    title: str
    caption: str
    image: str


def draw_plots(curves: Mapping[str, Curve], tokens_per_second: Curve | None) -> list[Plot]:
    """Draw all plots for which the run has logged values.

    Args:
        curves: the curves of all scalars by tag.
        tokens_per_second: the speed of the training; None if it is unknown.
    """
    speed = {} if tokens_per_second is None else {"tokens per second": tokens_per_second}
    memory = {
        label: replace(curve, means=curve.means / _GIB, lows=curve.lows / _GIB, highs=curve.highs / _GIB)
        for label, curve in _named(
            curves, {"mem-max-allocated-bytes": "most", "mem-allocated-bytes": "now", "mem-reserved-bytes": "reserved"}
        ).items()
    }
    routers = {tag: curve for tag, curve in curves.items() if re.fullmatch(r"(\w+_)?(load_balancing|z)_loss", tag)}
    load = {"experts": "expert_load_max_over_mean", "ranks": "rank_load_max_over_mean"}
    plots = (
        ("Loss", "Loss in nats per token.", _losses(curves), {}),
        ("Speed", "Tokens of all ranks per second.", speed, {"from_zero": True}),
        (
            "Learning rate",
            "Learning rate of the optimizer.",
            _named(curves, {"learning-rate": "learning rate"}),
            {"from_zero": True},
        ),
        ("Gradient norm", "Norm of all gradients before clipping.", _named(curves, {"grad-norm": "norm"}), {}),
        ("Router losses", "Losses of the routers, mean over the MoE layers.", routers, {}),
        (
            "Load",
            "Tokens of the busiest expert, and of the busiest expert-parallel rank, divided by the mean. The value is "
            "1 if the load is even.",
            _named(curves, {tag: label for label, tag in load.items()}),
            {},
        ),
        (
            "Routing entropy",
            "How undecided the routers are about tokens with at least two visible experts, in nats.",
            _named(curves, {"routing_entropy": "entropy"}),
            {"from_zero": True},
        ),
        ("Memory", "Memory of the GPU of the last rank in GiB.", memory, {"from_zero": True}),
    )
    drawn = [Plot(title, caption, _lines(lines, **options)) for title, caption, lines, options in plots if lines]
    layers = {int(match[1]): curve for tag, curve in curves.items() if (match := _LAYER.fullmatch(tag))}
    if layers:
        caption = "Tokens of the busiest expert of each MoE layer, divided by the mean of the layer's experts."
        drawn.append(Plot("Load by layer", caption, _map(layers)))
    return drawn


def _named(curves: Mapping[str, Curve], labels: Mapping[str, str]) -> dict[str, Curve]:
    """Return those curves that exist, by their labels; `labels` has the label of each tag."""
    return {label: curves[tag] for tag, label in labels.items() if tag in curves}


def _losses(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the losses of training, of held-out text and of multi-token prediction by label."""
    found = _named(curves, {"lm loss": "training", "lm loss validation": "held-out"})
    for tag, curve in curves.items():
        if tag.startswith("lm loss validation-") or re.fullmatch(r"mtp_\d+ loss", tag):
            found[tag.removeprefix("lm loss ")] = curve
    return found


def _lines(lines: Mapping[str, Curve], from_zero: bool = False) -> str:
    """Draw curves by label. A shade shows the smallest and largest values if a point covers several iterations.

    Args:
        lines: the curves.
        from_zero: whether the y axis begins at 0. Otherwise the axis is logarithmic if values differ by a factor of 2.
    """
    axes = _new_axes()
    for (label, curve), color in zip(lines.items(), _COLORS * (1 + len(lines) // len(_COLORS)), strict=False):
        marker = "o" if len(curve) <= 30 else None
        axes.plot(curve.steps, curve.means, color=color, linewidth=1.2, marker=marker, markersize=3, label=label)
        if (curve.lows < curve.highs).any():
            axes.fill_between(curve.steps, curve.lows, curve.highs, color=color, alpha=0.2, linewidth=0)
    lowest, highest = (function([function(curve.means) for curve in lines.values()]) for function in (min, max))
    if from_zero:
        axes.set_ylim(0, highest * 1.1 or 1)
        if highest >= 1000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
    elif lowest > 0 and highest > 2 * lowest:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if highest < 10 * lowest else (1,)))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(lines) > 1:
        axes.legend(frameon=False)
    return _image(axes)


def _map(layers: Mapping[int, Curve]) -> str:
    """Draw the load of all layers over iterations as a map of colors."""
    steps = np.unique(np.concatenate([curve.steps for curve in layers.values()]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, _MOST_COLUMNS).astype(int))]
    # A column shows each layer's point that covers the column's iteration, or the layer's last point.
    values = np.array(
        [
            curve.means[np.minimum(np.searchsorted(curve.steps, steps), len(curve) - 1)]
            for _, curve in sorted(layers.items())
        ]
    )  # [layers, columns]
    axes = _new_axes(min(6.0, 1.6 + 0.16 * len(layers)))
    edges = np.concatenate([steps[:1] - (steps[1:2] - steps[:1] if len(steps) > 1 else [1]), steps])
    highest = max(2.0, float(np.quantile(values, 0.99)))
    # A raster keeps the page small.
    mesh = axes.pcolormesh(
        edges, np.arange(len(layers) + 1), values, cmap="viridis", vmin=1, vmax=highest, rasterized=True
    )
    axes.grid(False)
    shown = range(0, len(layers), -(-len(layers) // 16))
    numbers = sorted(layers)
    axes.set_yticks([index + 0.5 for index in shown], [str(numbers[index]) for index in shown])
    axes.set_ylabel("layer")
    axes.figure.colorbar(mesh, ax=axes, label="busiest expert / mean", extend="max")
    return _image(axes)


def _new_axes(height: float = 2.9) -> "Axes":
    """Return the axes of a new figure whose height is given in inches."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, height), dpi=100, layout="constrained").add_subplot()
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("iteration")
    return axes


def _image(axes: "Axes") -> str:
    """Return the figure of some axes as a `data:` URI."""
    from matplotlib import rc_context

    figure: Any = axes.figure
    svg = io.StringIO()
    # Text remains text, in the fonts of the reader.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue().encode()).decode()}"
