"""Draws the results of an analysis as plots."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.routing_analysis.analysis import Analysis
from maskmoe.routing_analysis.statistics import mean_where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_MAX_PANELS = 16
_COLORS = ("#1f4e9c", "#2a9d5c", "#d9822b", "#6b6b6b")


def write_plots(analysis: Analysis, folder: Path) -> list[Path]:
    """Write a PNG file for each plot, and return the paths of the files.

    Raises:
        UserError: a file cannot be written.
    """
    return [_write(folder / name, draw, analysis) for name, draw in _PLOTS.items()]


def _write(path: Path, draw: Callable[["Figure", Analysis], None], analysis: Analysis) -> Path:
    """Draw one plot and write its PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(dpi=130, layout="constrained")
    draw(figure, analysis)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw_load(figure: "Figure", analysis: Analysis) -> None:
    """Draw a heat map of the load of each expert over the mean load of its layer, for the last model."""
    checkpoint = analysis.checkpoints[-1]
    load = checkpoint.load.sum(axis=1)  # [L, N]
    figure.set_size_inches(
        _clip_inches(2.5 + 0.3 * analysis.num_experts), _clip_inches(1.8 + 0.3 * len(analysis.layers))
    )
    axes = figure.subplots()
    image = axes.imshow(load / load.mean(axis=1, keepdims=True), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(title=f"Load of experts over the mean, {checkpoint.name}", xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(analysis.layers)), [str(layer) for layer in analysis.layers])
    _use_whole_numbers(axes.xaxis)
    figure.colorbar(image, extend="max")


def _draw_entropy(figure: "Figure", analysis: Analysis) -> None:
    """Draw a line for the entropy of each layer over the series, and a line for the largest possible mean."""
    means = np.array([checkpoint.entropy.mean for checkpoint in analysis.checkpoints])
    bounds = np.array([checkpoint.entropy.bound for checkpoint in analysis.checkpoints])
    axes = figure.subplots()
    _draw_layers(axes, means, analysis)
    axes.axhline(np.nanmax(bounds, initial=0), color="#6b6b6b", linestyle="--", linewidth=1, label="at most")
    axes.set(title="Entropy of routing, tokens with V > 1", ylabel="nats")
    axes.set_ylim(bottom=0)
    _label_series(axes, [checkpoint.name for checkpoint in analysis.checkpoints], _iterations(analysis))


def _draw_fluctuation(figure: "Figure", analysis: Analysis) -> None:
    """Draw a line for the changed experts of each layer over the series, from the second model on."""
    axes = figure.subplots()
    axes.set(title="Experts that changed since the model before, tokens with V > 1", ylabel="share")
    if not analysis.fluctuation:
        _write_message(axes, "only one model")
        return
    shares = np.array([change.routable_by_layer for change in analysis.fluctuation])
    _draw_layers(axes, shares, analysis, start=1)
    axes.set_ylim(bottom=0)
    names = [checkpoint.name for checkpoint in analysis.checkpoints]
    _label_series(axes, names[1:], _iterations(analysis)[1:])


def _draw_coactivation(figure: "Figure", analysis: Analysis) -> None:
    """Draw heat maps of the best experts of tokens in consecutive layers with experts, for the last model."""
    checkpoint = analysis.checkpoints[-1]
    num_pairs = len(checkpoint.transitions)
    if not num_pairs:
        _write_message(figure.subplots(), "only one layer has experts")
        return
    shown = np.unique(np.linspace(0, num_pairs - 1, min(num_pairs, _MAX_PANELS)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(_clip_inches(3.2 * columns + 1), 3.2 * rows + 0.6)
    figure.suptitle(f"Where tokens of an expert go in the next layer\n{checkpoint.name}", fontsize="medium")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for pair, axes in zip(shown, all_axes, strict=False):
        counts = checkpoint.transitions[pair]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        axes.set(xlabel=f"layer {analysis.layers[pair + 1]}", ylabel=f"layer {analysis.layers[pair]}")
        _use_whole_numbers(axes.xaxis)
        _use_whole_numbers(axes.yaxis)
        axes.set_title(f"{checkpoint.layer_information[pair]:.2f} nats", fontsize="medium")
    for axes in all_axes:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes)


def _draw_distinct_experts(figure: "Figure", analysis: Analysis) -> None:
    """Draw bars for the number of distinct experts of an id, by layer and frequency band, for the last model."""
    checkpoint = analysis.checkpoints[-1]
    of_ids = checkpoint.distinct_experts
    band_of_id = analysis.bands.band_of_id[of_ids.ids]
    axes = figure.subplots()
    places = np.arange(len(analysis.layers))
    width = 0.8 / len(analysis.bands.names)
    for band, name in enumerate(analysis.bands.names):
        left = places + (band - (len(analysis.bands.names) - 1) / 2) * width
        counted = band_of_id == band
        axes.bar(left, mean_where(of_ids.distinct, counted), width, color=_COLORS[band], alpha=0.4, label=name)
        axes.bar(left, mean_where(of_ids.effective, counted), width, color=_COLORS[band])
    axes.set_xticks(places, [str(layer) for layer in analysis.layers])
    axes.set(
        title=f"Distinct experts of an id by frequency (dark: effective), {checkpoint.name}",
        xlabel="layer",
        ylabel=f"experts, ids with at least {analysis.settings.min_occurrences} tokens",
    )
    axes.title.set_fontsize("medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _tidy(axes)


def _draw_layers(axes: "Axes", values: np.ndarray, analysis: Analysis, start: int = 0) -> None:
    """Draw a line for each layer.

    Args:
        axes: where to draw.
        values: float64 [models, L].
        analysis: the analysis that the values belong to.
        start: position in the series of the first model in `values`.
    """
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(analysis.layers)))
    positions = _iterations(analysis)[start:]
    for layer, of_layer, color in zip(analysis.layers, values.T, colors, strict=True):
        axes.plot(positions, of_layer, marker="o", markersize=4, color=color, label=f"layer {layer}")


def _iterations(analysis: Analysis) -> list[int]:
    """Return the horizontal positions of the models: their iterations if these ascend, else 0, 1, 2, …."""
    known = [checkpoint.iteration for checkpoint in analysis.checkpoints if checkpoint.iteration is not None]
    if len(known) == len(analysis.checkpoints) and known == sorted(set(known)):
        return known
    return list(range(len(analysis.checkpoints)))


def _label_series(axes: "Axes", names: list[str], positions: list[int]) -> None:
    """Label the horizontal axis with iterations, or with the names of models that have none, and add a legend."""
    if positions == list(range(positions[0], positions[0] + len(positions))):
        axes.set_xticks(positions, names, rotation=30, ha="right")
    else:
        axes.set_xlabel("iteration")
        _use_whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize="small", ncols=math.ceil(len(axes.lines) / 12))
    _tidy(axes)


def _use_whole_numbers(axis: "Axis") -> None:
    """Put the ticks of an axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _tidy(axes: "Axes") -> None:
    """Add grid lines and remove the frame at the top and at the right."""
    axes.grid(color="#e6e6e6", linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_message(axes: "Axes", text: str) -> None:
    """Write a text in place of a plot that has no data."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _clip_inches(inches: float) -> float:
    """Limit the side of a figure to 5 to 16 inches."""
    return min(max(inches, 5.0), 16.0)


_PLOTS: dict[str, Callable[["Figure", Analysis], None]] = {
    "load.png": _draw_load,
    "entropy.png": _draw_entropy,
    "fluctuation.png": _draw_fluctuation,
    "coactivation.png": _draw_coactivation,
    "distinct_experts.png": _draw_distinct_experts,
}
PLOT_NAMES = tuple(_PLOTS)
