"""The results as plots."""

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
    """Write the PNG files; returns their paths. Raises UserError where one cannot be written."""
    return [_write(folder / name, draw, analysis) for name, draw in _PLOTS.items()]


def _write(path: Path, draw: Callable[["Figure", Analysis], None], analysis: Analysis) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(dpi=130, layout="constrained")
    draw(figure, analysis)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw_load(figure: "Figure", analysis: Analysis) -> None:
    """Heat map of the last model: an expert's load over the mean of its layer."""
    checkpoint = analysis.checkpoints[-1]
    load = checkpoint.load.sum(axis=1)  # [L, N]
    figure.set_size_inches(_clip(2.5 + 0.3 * analysis.num_experts), _clip(1.8 + 0.3 * len(analysis.layers)))
    axes = figure.subplots()
    image = axes.imshow(load / load.mean(axis=1, keepdims=True), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(title=f"Load of experts over the mean, {checkpoint.name}", xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(analysis.layers)), analysis.layers)
    _use_whole_numbers(axes.xaxis)
    figure.colorbar(image, extend="max")


def _draw_entropy(figure: "Figure", analysis: Analysis) -> None:
    """A line for each layer over the series."""
    means = np.array([checkpoint.entropy.mean for checkpoint in analysis.checkpoints])
    axes = figure.subplots()
    _draw_layers(axes, means, analysis)
    axes.axhline(np.nanmax(_bounds(analysis), initial=0), color="#6b6b6b", linestyle="--", linewidth=1, label="at most")
    axes.set(title="Entropy of routing, tokens with V > 1", ylabel="nats")
    axes.set_ylim(bottom=0)
    _label_series(axes, [checkpoint.name for checkpoint in analysis.checkpoints], _iterations(analysis))


def _bounds(analysis: Analysis) -> np.ndarray:
    return np.array([checkpoint.entropy.bound for checkpoint in analysis.checkpoints])


def _draw_fluctuation(figure: "Figure", analysis: Analysis) -> None:
    """A line for each layer over the series, from its second model on."""
    axes = figure.subplots()
    axes.set(title="Experts that changed since the model before, tokens with V > 1", ylabel="share")
    if not analysis.fluctuation:
        _say(axes, "only one model")
        return
    shares = np.array([change.routable_by_layer for change in analysis.fluctuation])
    _draw_layers(axes, shares, analysis, start=1)
    axes.set_ylim(bottom=0)
    names = [checkpoint.name for checkpoint in analysis.checkpoints]
    _label_series(axes, names[1:], _iterations(analysis)[1:])


def _draw_coactivation(figure: "Figure", analysis: Analysis) -> None:
    """For consecutive layers of the last model, which best experts follow each other."""
    checkpoint = analysis.checkpoints[-1]
    num_pairs = len(checkpoint.transitions)
    if not num_pairs:
        _say(figure.subplots(), "only one layer has experts")
        return
    shown = np.unique(np.linspace(0, num_pairs - 1, min(num_pairs, _MAX_PANELS)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(_clip(3.2 * columns + 1), 3.2 * rows + 0.6)
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
    """For each band of the last model, over how many experts an id spreads in each layer."""
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
    axes.set_xticks(places, analysis.layers)
    axes.set(
        title=f"Distinct experts of an id by frequency (dark: effective), {checkpoint.name}",
        xlabel="layer",
        ylabel=f"experts, ids with at least {analysis.settings.min_occurrences} tokens",
    )
    axes.title.set_fontsize("medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _tidy(axes)


def _draw_layers(axes: "Axes", values: np.ndarray, analysis: Analysis, start: int = 0) -> None:
    """A line for each layer: values [models, L], of the models from `start` on."""
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(analysis.layers)))
    positions = _iterations(analysis)[start:]
    for layer, of_layer, color in zip(analysis.layers, values.T, colors, strict=True):
        axes.plot(positions, of_layer, marker="o", markersize=4, color=color, label=f"layer {layer}")


def _iterations(analysis: Analysis) -> list[int]:
    """Where the models stand on the horizontal axis: at their iterations if these ascend, else side by side."""
    iterations = [checkpoint.iteration for checkpoint in analysis.checkpoints]
    if None not in iterations and iterations == sorted(set(iterations)):
        return iterations
    return list(range(len(iterations)))


def _label_series(axes: "Axes", names: list[str], positions: list[int]) -> None:
    if positions == list(range(positions[0], positions[0] + len(positions))):
        axes.set_xticks(positions, names, rotation=30, ha="right")
    else:
        axes.set_xlabel("iteration")
        _use_whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize="small", ncols=math.ceil(len(axes.lines) / 12))
    _tidy(axes)


def _use_whole_numbers(axis: "Axis") -> None:
    """Ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _tidy(axes: "Axes") -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _clip(inches: float) -> float:
    return min(max(inches, 5.0), 16.0)


_PLOTS: dict[str, Callable[["Figure", Analysis], None]] = {
    "load.png": _draw_load,
    "entropy.png": _draw_entropy,
    "fluctuation.png": _draw_fluctuation,
    "coactivation.png": _draw_coactivation,
    "distinct_experts.png": _draw_distinct_experts,
}
PLOT_NAMES = tuple(_PLOTS)
