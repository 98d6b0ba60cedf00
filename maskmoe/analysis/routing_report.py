"""Writes the results of an analysis: tidy CSV files, plots, and a table for the terminal.

Every CSV file starts with the columns `checkpoint` (the name of the model), `iteration` (empty if it is unknown) and
`layer` (from 1). Entropy is in nats.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskmoe.analysis.routing_analysis import RoutingAnalysis
from maskmoe.analysis.routing_statistics import RoutingStatistics, max_over_mean, mean_where
from maskmoe.files.csv_files import write_csv
from maskmoe.files.outputs import atomic_output

PLOT_NAMES = ("load.png", "bands.png", "fluctuation.png")
_EXPERTS, _TOKENS = ("first", "all"), ("all", "routable")  # the axes of `RoutingStatistics.explained`
_BY_LAYER = ("entropy", "entropy_bound", "first_weight", "single_expert_share")

Rows = Iterator[tuple[Any, ...]]
"""The rows of one model: the position of the layer, and the cells after the column `layer`."""


def write_tables(analysis: RoutingAnalysis, folder: Path) -> list[Path]:
    """Write all tables into an existing folder, and return their paths. Raises UserError if one cannot be written."""
    for name, (columns, rows_of) in _TABLES.items():
        rows = (
            (model.name, model.iteration, analysis.layers[layer], *cells)
            for model, statistics in zip(analysis.models, analysis.statistics, strict=True)
            for layer, *cells in rows_of(analysis, statistics)
        )
        write_csv(folder / name, ("checkpoint", "iteration", "layer", *columns), rows)
    return [folder / name for name in TABLE_NAMES]


def _layer_rows(analysis: RoutingAnalysis, statistics: RoutingStatistics) -> Rows:
    """Yield the numbers of each layer."""
    load = max_over_mean(statistics.load.sum(axis=1))
    yield from zip(range(len(load)), load, *(getattr(statistics, name) for name in _BY_LAYER), strict=True)


def _load_rows(analysis: RoutingAnalysis, statistics: RoutingStatistics) -> Rows:
    """Yield the assignments of each expert, by the frequency band of the ids."""
    for (layer, band, expert), assignments in np.ndenumerate(statistics.load):
        yield layer, analysis.bands.names[band], expert, assignments


def _explained_rows(analysis: RoutingAnalysis, statistics: RoutingStatistics) -> Rows:
    """Yield the shares of the routing that the id explains."""
    for (experts, tokens, layer), explained in np.ndenumerate(statistics.explained):
        yield layer, _EXPERTS[experts], _TOKENS[tokens], explained


def _fluctuation_rows(analysis: RoutingAnalysis, statistics: RoutingStatistics) -> Rows:
    """Yield the changes since the previous model, for each group of tokens."""
    if statistics.changed is not None:
        groups = ("all", "routable", *analysis.bands.names)
        for (group, layer), changed in np.ndenumerate(statistics.changed):
            yield layer, groups[group], changed


def _id_rows(analysis: RoutingAnalysis, statistics: RoutingStatistics) -> Rows:
    """Yield the numbers of experts of each id that occurs often enough."""
    for (layer, place), distinct in np.ndenumerate(statistics.distinct):
        token_id = int(analysis.listed_ids[place])
        band, occurrences = analysis.bands.names[analysis.bands.band_of_id[token_id]], analysis.occurrences[token_id]
        piece = analysis.pieces.get(token_id, "")
        yield layer, token_id, piece, band, occurrences, distinct, statistics.effective[layer, place]


def _top_id_rows(analysis: RoutingAnalysis, statistics: RoutingStatistics) -> Rows:
    """Yield the most frequent ids of each expert, and their share of its tokens over their share of the probe."""
    load = statistics.load.sum(axis=1)
    for (layer, expert, rank), tokens in np.ndenumerate(statistics.top_counts):
        if tokens:
            token_id = int(statistics.top_ids[layer, expert, rank])
            share = tokens / load[layer, expert]
            lift = share / (analysis.occurrences[token_id] / analysis.occurrences.sum())
            yield layer, expert, rank + 1, token_id, analysis.pieces.get(token_id, ""), tokens, share, lift


_TABLES: dict[str, tuple[tuple[str, ...], Callable[[RoutingAnalysis, RoutingStatistics], Rows]]] = {
    "layers.csv": (("load_max_over_mean", *_BY_LAYER), _layer_rows),
    "load.csv": (("band", "expert", "assignments"), _load_rows),
    "explained.csv": (("experts", "tokens", "explained"), _explained_rows),
    "fluctuation.csv": (("tokens", "changed"), _fluctuation_rows),
    "ids.csv": (("id", "piece", "band", "occurrences", "distinct", "effective"), _id_rows),
    "top_ids.csv": (("expert", "rank", "id", "piece", "tokens", "share", "lift"), _top_id_rows),
}
TABLE_NAMES = tuple(_TABLES)


def terminal_table(analysis: RoutingAnalysis) -> Iterator[str]:
    """Yield the lines of a table for the terminal, with a row of means over the layers for each model."""
    columns = {
        "load max/mean": ".2f",
        "entropy": ".3f",
        "of at most": ".3f",
        "one expert": ".1%",
        "by the id": ".1%",
        "experts an id": ".2f",
        "changed": ".1%",
        "of V > 1": ".1%",
    }
    yield "means over the layers; entropy in nats, per cent of tokens or, by the id, of the uncertainty"
    yield f"{'model':<28}" + "".join(f"{title:>{len(title) + 3}}" for title in columns)
    for model, statistics in zip(analysis.models, analysis.statistics, strict=True):
        shown = [
            max_over_mean(statistics.load.sum(axis=1)),
            *(statistics.entropy, statistics.entropy_bound, statistics.single_expert_share, statistics.explained[0, 0]),
            statistics.distinct,
            *(() if statistics.changed is None else statistics.changed[:2]),
        ]
        cells = zip(columns.items(), shown, strict=False)  # the first model has no model before it
        line = "".join(f"{_mean(values):>{len(title) + 3}{form}}" for (title, form), values in cells)
        yield f"{model.name[-27:]:<28}{line}"


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    return float(mean_where(values.ravel(), ~np.isnan(values.ravel())))


def write_plots(analysis: RoutingAnalysis, folder: Path) -> list[Path]:
    """Write the plots as PNG files, and return their paths.

    `fluctuation.png` needs two models. Without them, the file of an earlier analysis is removed.

    Raises:
        UserError: A file cannot be written.
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
        analysis: The analysis.
        title: The title of the figure.
        maps: Values from 0, [L, N], by the title of their panel.
        color_map: Matplotlib's name of the colours.
        largest: The value of the last colour.
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
