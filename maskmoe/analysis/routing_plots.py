"""Draws the results of an analysis: load of the experts, their share of each frequency band, and changes."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskmoe.analysis.routing_analysis import RoutingAnalysis
from maskmoe.files.outputs import atomic_output

PLOT_NAMES = ("load.png", "bands.png", "fluctuation.png")


def write_plots(analysis: RoutingAnalysis, folder: Path) -> list[Path]:
    """Write the plots as PNG files, and return their paths.

    `fluctuation.png` needs two models. Without them, the file of an earlier analysis is removed.

    Raises:
        UserError: a file cannot be written.
    """
    load = analysis.statistics[-1].load.astype(np.float64)  # [layers, bands, experts]
    of_expert = load.sum(axis=1)  # [layers, experts]
    over_mean = of_expert / of_expert.mean(axis=1, keepdims=True)
    shares = (load / np.maximum(of_expert, 1)[:, None]).swapaxes(0, 1)
    titles = ("Load of the experts over the mean", "Share of each expert's tokens by the frequency of their ids")
    figures = {
        "load.png": _heat_maps(analysis, titles[0], {"": over_mean}, "RdBu_r", 2),
        "bands.png": _heat_maps(analysis, titles[1], dict(zip(analysis.bands.names, shares, strict=True)), "Blues", 1),
    }
    if len(analysis.models) > 1:
        figures["fluctuation.png"] = _fluctuation(analysis)
    for stale in set(PLOT_NAMES) - figures.keys():
        (folder / stale).unlink(missing_ok=True)
    for file_name, figure in figures.items():
        with atomic_output(folder / file_name) as path:
            figure.savefig(path, format="png")
    return [folder / file_name for file_name in figures]


def _heat_maps(
    analysis: RoutingAnalysis, title: str, maps: dict[str, np.ndarray], color_map: str, largest: float
) -> Figure:
    """Draw heat maps of layers and experts for the last model.

    Args:
        analysis: the analysis.
        title: the title of the figure.
        maps: values from 0, [L, N], by the title of their panel.
        color_map: matplotlib's name of the colours.
        largest: the value of the last colour.
    """
    num_layers = len(analysis.layers)
    figure = Figure((5 * len(maps) + 1, np.clip(1.8 + 0.3 * num_layers, 2.5, 16)), dpi=130, layout="constrained")
    figure.suptitle(f"{title}, {analysis.models[-1].name}", fontsize="medium")
    for axes, (panel, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        image = axes.imshow(values, aspect="auto", cmap=color_map, vmin=0, vmax=largest)
        axes.set(xlabel="expert", ylabel="layer", title=panel)
        axes.set_yticks(range(num_layers), [str(layer) for layer in analysis.layers], fontsize="x-small")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    figure.colorbar(image, ax=figure.axes)
    return figure


def _fluctuation(analysis: RoutingAnalysis) -> Figure:
    """Draw a line for each layer: the changed experts of tokens that see several, from the second model on."""
    changed = np.stack(
        [measured.changed[1] for measured in analysis.statistics if measured.changed is not None]
    )  # [models, layers]
    figure = Figure(dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(analysis.layers))))
    lines = axes.plot(changed, marker="o", markersize=4)
    axes.set_xticks(range(len(changed)), [model.name for model in analysis.models[1:]], rotation=30, ha="right")
    axes.set_title("Experts that changed since the model before, tokens with V > 1", fontsize="medium")
    axes.set(ylabel="share", ylim=(0, None))
    axes.grid(alpha=0.4)
    labels = [f"layer {layer}" for layer in analysis.layers]
    figure.legend(lines, labels, loc="outside right upper", fontsize="x-small", ncols=1 + len(labels) // 30)
    return figure
