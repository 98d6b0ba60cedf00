"""Draws the results of an analysis as plots."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskmoe.outputs import atomic_output
from maskmoe.routing_analysis.analysis import Analysis
from maskmoe.routing_analysis.statistics import mean_where

_MAX_PANELS = 16
_COLORS = ("#1f4e9c", "#2a9d5c", "#d9822b", "#6b6b6b")


def write_plots(analysis: Analysis, folder: Path) -> list[Path]:
    """Write a PNG file for each plot, and return the paths of the files.

    Raises:
        UserError: a file cannot be written.
    """
    for name, draw in _PLOTS.items():
        figure = Figure(dpi=130, layout="constrained")
        draw(figure, analysis)
        with atomic_output(folder / name) as path:
            figure.savefig(path, format="png")
    return [folder / name for name in _PLOTS]


def _draw_load(figure: Figure, analysis: Analysis) -> None:
    """Draw a heat map of the load of each expert over the mean load of its layer, for the last model."""
    load = analysis.statistics["load"][-1].sum(axis=1)  # [L, N]
    num_layers, num_experts = load.shape
    figure.set_size_inches(np.clip((2.5 + 0.3 * num_experts, 1.8 + 0.3 * num_layers), 5, 16))
    axes = figure.subplots()
    image = axes.imshow(load / load.mean(axis=1, keepdims=True), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(title=f"Load of experts over the mean, {analysis.models[-1].name}", xlabel="expert", ylabel="layer")
    axes.set_yticks(range(num_layers), map(str, analysis.shape.layers))
    _use_whole_numbers(axes.xaxis)
    figure.colorbar(image, extend="max")


def _draw_entropy(figure: Figure, analysis: Analysis) -> None:
    """Draw a line for the entropy of each layer over the series, and a line for the largest possible mean."""
    axes = figure.subplots()
    axes.set(title="Entropy of routing, tokens with V > 1", ylabel="nats")
    largest = np.nanmax(analysis.statistics["entropy_bound"], initial=0)
    _draw_series(axes, analysis, analysis.statistics["entropy"], largest)


def _draw_fluctuation(figure: Figure, analysis: Analysis) -> None:
    """Draw a line for the changed experts of each layer over the series, from the second model on."""
    axes = figure.subplots()
    axes.set(title="Experts that changed since the model before, tokens with V > 1", ylabel="share")
    if len(analysis.models) > 1:
        _draw_series(axes, analysis, analysis.statistics["changed"][1:, 1])
    else:
        _write_message(axes, "only one model")


def _draw_coactivation(figure: Figure, analysis: Analysis) -> None:
    """Draw heat maps of the best experts of tokens in consecutive layers with experts, for the last model."""
    transitions = analysis.statistics["transitions"][-1]
    num_pairs = len(transitions)
    if not num_pairs:
        _write_message(figure.subplots(), "only one layer has experts")
        return
    shown = np.unique(np.linspace(0, num_pairs - 1, min(num_pairs, _MAX_PANELS)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(np.clip(3.2 * columns + 1, 5, 16), 3.2 * rows + 0.6)
    title = f"Where tokens of an expert go in the next layer\n{analysis.models[-1].name}"
    figure.suptitle(title, fontsize="medium")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for pair, axes in zip(shown, all_axes, strict=False):
        counts = transitions[pair]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        layer, next_layer = analysis.shape.layers[pair : pair + 2]
        axes.set(xlabel=f"layer {next_layer}", ylabel=f"layer {layer}")
        _use_whole_numbers(axes.xaxis)
        _use_whole_numbers(axes.yaxis)
        information = analysis.statistics["next_layer_information"][-1, pair]
        axes.set_title(f"{information:.2f} nats", fontsize="medium")
    for axes in all_axes:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes)


def _draw_distinct_experts(figure: Figure, analysis: Analysis) -> None:
    """Draw bars for the number of distinct experts of an id, by layer and frequency band, for the last model."""
    names, layers = analysis.bands.names, analysis.shape.layers
    *_, band_of_id = analysis.counted_ids()
    axes = figure.subplots()
    places = np.arange(len(layers))
    width = 0.8 / len(names)
    for band, name in enumerate(names):
        left = places + (band - (len(names) - 1) / 2) * width
        distinct, effective = (
            mean_where(analysis.statistics[statistic][-1], band_of_id == band)
            for statistic in ("distinct", "effective")
        )
        axes.bar(left, distinct, width, color=_COLORS[band], alpha=0.4, label=name)
        axes.bar(left, effective, width, color=_COLORS[band])
    axes.set_xticks(places, map(str, layers))
    axes.set(xlabel="layer", ylabel=f"experts, ids with at least {analysis.settings.min_occurrences} tokens")
    title = f"Distinct experts of an id by frequency (dark: effective), {analysis.models[-1].name}"
    axes.set_title(title, fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _tidy(axes)


def _draw_series(axes: Axes, analysis: Analysis, values: np.ndarray, limit: float | None = None) -> None:
    """Draw a line for each layer over the last models of the series, and a legend.

    The horizontal axis has iterations. It has the names of the models if the iterations do not ascend, or ascend by 1.

    Args:
        axes: where to draw.
        analysis: the analysis that the values belong to.
        values: float64 [models, L].
        limit: the height of a dashed line; None for no such line.
    """
    start = len(analysis.models) - len(values)
    names = [model.name for model in analysis.models][start:]
    iterations = [model.iteration for model in analysis.models if model.iteration is not None]
    ascend = len(iterations) == len(analysis.models) and iterations == sorted(set(iterations))
    positions = iterations[start:] if ascend else list(range(start, len(analysis.models)))
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(analysis.shape.layers)))
    for layer, of_layer, color in zip(analysis.shape.layers, values.T, colors, strict=True):
        axes.plot(positions, of_layer, marker="o", markersize=4, color=color, label=f"layer {layer}")
    if limit is not None:
        axes.axhline(limit, color="#6b6b6b", linestyle="--", linewidth=1, label="at most")
    if positions == list(range(positions[0], positions[0] + len(positions))):
        axes.set_xticks(positions, names, rotation=30, ha="right")
    else:
        axes.set_xlabel("iteration")
        _use_whole_numbers(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small", ncols=math.ceil(len(axes.lines) / 12))
    _tidy(axes)


def _use_whole_numbers(axis: Axis) -> None:
    """Put the ticks of an axis at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True))


def _tidy(axes: Axes) -> None:
    """Add grid lines and remove the frame at the top and at the right."""
    axes.grid(color="#e6e6e6", linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_message(axes: Axes, text: str) -> None:
    """Write a text in place of a plot that has no data."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


_PLOTS: dict[str, Callable[[Figure, Analysis], None]] = {
    "load.png": _draw_load,
    "entropy.png": _draw_entropy,
    "fluctuation.png": _draw_fluctuation,
    "coactivation.png": _draw_coactivation,
    "distinct_experts.png": _draw_distinct_experts,
}
PLOT_NAMES = tuple(_PLOTS)
