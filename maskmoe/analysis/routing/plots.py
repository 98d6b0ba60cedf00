"""Draws the results of an analysis as plots."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskmoe.analysis.routing.analysis import Analysis
from maskmoe.analysis.routing.statistics import mean_where
from maskmoe.files.outputs import atomic_output

_MAX_PANELS = 16
# More lines or bars than this have no label of their own.
_MAX_LEGEND, _MAX_TICKS = 12, 24
_COLORS = ("#1f4e9c", "#2a9d5c", "#d9822b", "#6b6b6b")


class _NothingToShowError(Exception):
    """An analysis has no values for a plot; the message says why."""


def write_plots(analysis: Analysis, folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Write a PNG file for each plot that has something to show.

    A file of an earlier analysis is removed if the plot has nothing to show now.

    Returns:
        The paths of the files; and for each plot that is not drawn, by the name of its file, the reason.

    Raises:
        UserError: a file cannot be written.
    """
    written, reasons = [], {}
    for name, draw in _PLOTS.items():
        figure = Figure(dpi=130, layout="constrained")
        try:
            draw(figure, analysis)
        except _NothingToShowError as reason:
            reasons[name] = str(reason)
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_output(folder / name) as path:
            figure.savefig(path, format="png")
        written.append(folder / name)
    return written, reasons


def _draw_load(figure: Figure, analysis: Analysis) -> None:
    """Draw a heat map of the load of each expert over the mean load of its layer, for the last model."""
    load = analysis.statistics["load"][-1].sum(axis=1)  # [L, N]
    num_layers, num_experts = load.shape
    figure.set_size_inches(np.clip(2.5 + 0.3 * num_experts, 5, 16), np.clip(1.8 + 0.3 * num_layers, 2.5, 16))
    axes = figure.subplots()
    image = axes.imshow(load / load.mean(axis=1, keepdims=True), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"Load of experts over the mean, {analysis.models[-1].name}", fontsize="medium")
    _name_layers(axes.yaxis, analysis)
    _use_whole_numbers(axes.xaxis)
    figure.colorbar(image, extend="max")


def _draw_entropy(figure: Figure, analysis: Analysis) -> None:
    """Draw the entropy of each layer and its largest possible mean: over the series, or over the layers of one model.

    A series has one line for the largest possible mean of all layers.
    """
    entropy, bound = analysis.statistics["entropy"], analysis.statistics["entropy_bound"]
    if np.isnan(entropy).all():
        raise _NothingToShowError("no token of the probe sees more than one expert")
    title = "Entropy of routing, tokens with V > 1"
    if len(analysis.models) > 1:
        axes = figure.subplots()
        _draw_series(axes, analysis, entropy, np.nanmax(bound))
    else:
        axes, places = _draw_bars(figure, analysis, entropy[0], "entropy")
        axes.hlines(bound[0], places - 0.45, places + 0.45, color=_COLORS[2], label="at most")
        axes.set_ylim(0, 1.15 * np.nanmax(bound))
        axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper right")
        title += f", {analysis.models[0].name}"
    axes.set(title=title, ylabel="nats")


def _draw_fluctuation(figure: Figure, analysis: Analysis) -> None:
    """Draw the changed experts of each layer: lines over the series from the second model on, or bars of two models."""
    if len(analysis.models) < 2:
        raise _NothingToShowError("changes need two models")
    changed = analysis.statistics["changed"][1:, 1]
    if np.isnan(changed).all():
        raise _NothingToShowError("no token of the probe sees more than one expert")
    if len(changed) > 1:
        axes = figure.subplots()
        _draw_series(axes, analysis, changed)
        title = "Experts that changed since the model before, tokens with V > 1"
    else:
        axes, _ = _draw_bars(figure, analysis, changed[0], "changed")
        first, second = analysis.models
        title = f"Experts that changed from {first.name} to {second.name}, tokens with V > 1"
    axes.set_ylabel("share")
    axes.set_title(title, fontsize="medium")


def _draw_coactivation(figure: Figure, analysis: Analysis) -> None:
    """Draw heat maps of the best experts of tokens in consecutive layers with experts, for the last model."""
    transitions = analysis.statistics["transitions"][-1]
    num_pairs = len(transitions)
    if not num_pairs:
        raise _NothingToShowError("only one layer has experts")
    shown = np.unique(np.linspace(0, num_pairs - 1, min(num_pairs, _MAX_PANELS)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(np.clip(3.2 * columns + 1, 5, 16), 3.2 * rows + 0.6)
    title = f"Where tokens of an expert go in the next layer\n{analysis.models[-1].name}"
    figure.suptitle(title, fontsize="medium")
    counts = transitions[shown]
    shares = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    # The root keeps small shares visible beside a few large ones.
    norm = PowerNorm(0.5, vmin=0, vmax=np.quantile(shares, 0.998) or 1)
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for pair, shares_of_pair, axes in zip(shown, shares, all_axes, strict=False):
        image = axes.imshow(shares_of_pair, cmap="Blues", norm=norm)
        layer, next_layer = analysis.shape.layers[pair : pair + 2]
        axes.set(xlabel=f"expert of layer {next_layer}", ylabel=f"expert of layer {layer}")
        _use_whole_numbers(axes.xaxis)
        _use_whole_numbers(axes.yaxis)
        information = analysis.statistics["next_layer_information"][-1, pair]
        axes.set_title(f"{information:.2f} nats", fontsize="medium")
    for axes in all_axes:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes, extend="max", label="share of the tokens of an expert")


def _draw_distinct_experts(figure: Figure, analysis: Analysis) -> None:
    """Draw bars for the number of distinct experts of an id, by layer and frequency band, for the last model.

    A band without ids that occur often enough has no bars.
    """
    least = analysis.settings.min_occurrences
    *_, band_of_id = analysis.counted_ids()
    bands = np.unique(band_of_id)
    if not len(bands):
        raise _NothingToShowError(f"no id occurs {least} times in the probe")
    axes = _subplot_over_layers(figure, analysis)
    places = np.arange(len(analysis.shape.layers))
    width = 0.8 / len(bands)
    for number, band in enumerate(bands):
        centre = places + (number - (len(bands) - 1) / 2) * width
        distinct, effective = (
            mean_where(analysis.statistics[statistic][-1], band_of_id == band)
            for statistic in ("distinct", "effective")
        )
        name = f"{analysis.bands.names[band]}: {(band_of_id == band).sum()} ids"
        axes.bar(centre, distinct, width, color=_COLORS[band], alpha=0.4, label=name)
        axes.bar(centre, effective, width, color=_COLORS[band])
    axes.set_ylabel(f"experts, ids with at least {least} tokens")
    title = f"Distinct experts of an id by frequency (dark: effective), {analysis.models[-1].name}"
    axes.set_title(title, fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def _draw_bars(figure: Figure, analysis: Analysis, values: np.ndarray, label: str) -> tuple[Axes, np.ndarray]:
    """Draw a bar for each layer.

    Args:
        figure: where to draw.
        analysis: the analysis that the values belong to.
        values: float64 [L].
        label: the name of the bars in a legend.

    Returns:
        The axes, and the places of the bars, [L].
    """
    axes = _subplot_over_layers(figure, analysis)
    places = np.arange(len(values))
    axes.bar(places, values, 0.7, color=_COLORS[0], label=label)
    return axes, places


def _subplot_over_layers(figure: Figure, analysis: Analysis) -> Axes:
    """Return axes that have room for a group of bars at each layer, whose places are 0, 1 and so on."""
    figure.set_size_inches(np.clip(2 + 0.35 * len(analysis.shape.layers), 6.4, 14), 4.8)
    axes = figure.subplots()
    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, len(analysis.shape.layers) - 0.4)
    _name_layers(axes.xaxis, analysis)
    _tidy(axes)
    return axes


def _name_layers(axis: Axis, analysis: Analysis) -> None:
    """Write the numbers of the layers at the places 0, 1, …; of many layers, of evenly spaced ones."""
    layers = analysis.shape.layers
    places = range(0, len(layers), math.ceil(len(layers) / _MAX_TICKS))
    axis.set_ticks(list(places), [str(layers[place]) for place in places])


def _draw_series(axes: Axes, analysis: Analysis, values: np.ndarray, limit: float | None = None) -> None:
    """Draw a line for each layer over the last models of the series, and a legend; of many layers, a colour bar.

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
    layers = analysis.shape.layers
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, of_layer, color in zip(layers, values.T, colors, strict=True):
        axes.plot(positions, of_layer, marker="o", markersize=4, color=color, label=f"layer {layer}")
    if limit is not None:
        axes.axhline(limit, color="#6b6b6b", linestyle="--", linewidth=1, label="at most")
    if positions == list(range(positions[0], positions[0] + len(positions))):
        axes.set_xticks(positions, names, rotation=30, ha="right")
    else:
        axes.set_xlabel("iteration")
        _use_whole_numbers(axes.xaxis)
    axes.set_ylim(0, 1.08 * np.nanmax([*values.flat, limit or 0]) or 1)
    if len(layers) <= _MAX_LEGEND:
        axes.legend(frameon=False, fontsize="small")
    else:
        color_map = ListedColormap(colors)
        axes.figure.colorbar(ScalarMappable(Normalize(layers[0], layers[-1]), color_map), ax=axes, label="layer")
        axes.legend(handles=axes.lines[len(layers) :], frameon=False, fontsize="small")
    _tidy(axes)


def _use_whole_numbers(axis: Axis) -> None:
    """Put the ticks of an axis at whole numbers only."""
    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _tidy(axes: Axes) -> None:
    """Add grid lines and remove the frame at the top and at the right."""
    axes.grid(color="#e6e6e6", linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


_PLOTS: dict[str, Callable[[Figure, Analysis], None]] = {
    "load.png": _draw_load,
    "entropy.png": _draw_entropy,
    "fluctuation.png": _draw_fluctuation,
    "coactivation.png": _draw_coactivation,
    "distinct_experts.png": _draw_distinct_experts,
}
PLOT_NAMES = tuple(_PLOTS)
