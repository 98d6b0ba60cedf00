"""Writes the results of an analysis: routing.json, tidy CSV files, plots, and a table for the terminal."""

import csv
import json
import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.analysis.routing.analysis import Analysis
from maskmoe.analysis.routing.plots import PLOT_NAMES, write_plots
from maskmoe.analysis.routing.statistics import coefficient_of_variation, expert_capacity, max_over_mean, mean_where
from maskmoe.files.outputs import atomic_output

Row = dict[str, Any]
"""Cells by the names of their columns."""

_COLUMNS = {
    "load.csv": "checkpoint iteration layer band expert assignments",
    "drops.csv": "checkpoint iteration layer capacity_factor capacity dropped_share",
    "entropy.csv": "checkpoint iteration layer entropy bound single_expert_token_share first_weight "
    "id_expert_information next_layer_information",
    "specialisation.csv": "checkpoint iteration layer expert rank id piece count share lift",
    "coactivation.csv": "checkpoint iteration layer expert other_layer other_expert share",
    "fluctuation.csv": "from to layer tokens share",
    "distinct_experts.csv": "checkpoint iteration layer id piece band occurrences distinct effective",
}
TABLE_NAMES = tuple(_COLUMNS)
SUMMARY_NAME = "routing.json"
# Statistics with a number for each layer, which routing.json holds under the same names.
_BY_LAYER = (
    *("entropy", "entropy_bound", "single_expert_token_share", "first_weight"),
    *("id_expert_information", "next_layer_information"),
)


def result_files(folder: Path) -> list[Path]:
    """Return the paths of all files that `write_results` may write."""
    return [folder / name for name in (SUMMARY_NAME, *TABLE_NAMES, *PLOT_NAMES)]


def write_results(analysis: Analysis, folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Write routing.json, the tables, and the plots that have something to show.

    Args:
        analysis: the results.
        folder: an existing folder.

    Returns:
        The paths of the files; and for each plot that is not drawn, by the name of its file, the reason.

    Raises:
        UserError: a file cannot be written.
    """
    summary = folder / SUMMARY_NAME
    with atomic_output(summary) as path:
        content = json.dumps(summarise(analysis), indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(content + "\n", encoding="utf-8")
    tables = _tables(analysis)
    for name, columns in _COLUMNS.items():
        with atomic_output(folder / name) as path, open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns.split())
            writer.writerows([_cell(row[column]) for column in columns.split()] for row in tables[name])
    plots, reasons = write_plots(analysis, folder)
    return [summary, *(folder / name for name in TABLE_NAMES), *plots], reasons


def summarise(analysis: Analysis) -> dict[str, Any]:
    """Return all results but the tables of ids and of pairs of experts, as JSON values.

    Lists over layers are in the order of `layers`. A number without a value, such as the entropy of a layer in which no
    token has a choice, is None.
    """
    positions = range(len(analysis.models))
    return {
        "probe": _probe(analysis),
        **asdict(analysis.shape),
        "checkpoints": [_checkpoint(analysis, position) for position in positions],
        "fluctuation": [_fluctuation(analysis, position) for position in positions[1:]],
    }


def _probe(analysis: Analysis) -> dict[str, Any]:
    probe, bands = analysis.probe, analysis.bands
    tokens_of_band = np.bincount(bands.band_of_id[probe.token_ids], minlength=len(bands.names))
    ids_of_band = np.bincount(bands.band_of_id[np.unique(probe.token_ids)], minlength=len(bands.names))
    return {
        "source": probe.source,
        "tokens": len(probe.token_ids),
        "distinct_ids": int(ids_of_band.sum()),
        "seq_length": probe.seq_length,
        "batch_size": probe.batch_size,
        "micro_batch_tokens": analysis.micro_batch_tokens,
        "min_occurrences": analysis.settings.min_occurrences,
        "bands": [
            {"name": name, "tokens": tokens, "distinct_ids": ids}
            for name, tokens, ids in zip(bands.names, tokens_of_band.tolist(), ids_of_band.tolist(), strict=True)
        ],
    }


def _checkpoint(analysis: Analysis, position: int) -> dict[str, Any]:
    """Return the statistics of one model of the series."""
    model = analysis.models[position]
    statistics = {name: values[position] for name, values in analysis.statistics.items()}
    *_, band_of_id = analysis.counted_ids()
    load_by_band, distinct_by_band = {}, {}
    for band, name in enumerate(analysis.bands.names):
        load_by_band[name] = _load(statistics["load"][:, band])
        distinct_by_band[name] = _distinct_experts(statistics, band_of_id == band)
    return {
        "name": model.name,
        "iteration": model.iteration,
        "load": _load(statistics["load"].sum(axis=1)) | {"by_band": load_by_band},
        "drops": [
            {"capacity_factor": factor, "by_layer": json_numbers(dropped)}
            for factor, dropped in zip(analysis.settings.capacity_factors, statistics["dropped"], strict=True)
        ],
        **{name: json_numbers(statistics[name]) for name in _BY_LAYER},
        "id_expert_information_bound": math.log(analysis.shape.num_experts),
        "distinct_experts": _distinct_experts(statistics, band_of_id >= 0) | {"by_band": distinct_by_band},
    }


def _load(load: np.ndarray) -> dict[str, Any]:
    """Return the unevenness of a load, int64 [L, N], and the load."""
    return {
        "assignments": load.tolist(),
        "max_over_mean": json_numbers(max_over_mean(load)),
        "coefficient_of_variation": json_numbers(coefficient_of_variation(load)),
    }


def _distinct_experts(statistics: dict[str, np.ndarray], counted: np.ndarray) -> dict[str, Any]:
    """Return the means over the ids that `counted`, bool [F], selects."""
    return {
        "ids": int(counted.sum()),
        "by_layer": json_numbers(mean_where(statistics["distinct"], counted)),
        "effective_by_layer": json_numbers(mean_where(statistics["effective"], counted)),
    }


def _fluctuation(analysis: Analysis, position: int) -> dict[str, Any]:
    """Return the changes from the previous model of the series to a model."""
    of_all, of_routable, *of_bands = map(json_numbers, analysis.statistics["changed"][position])
    return {
        "from": analysis.models[position - 1].name,
        "to": analysis.models[position].name,
        "by_layer": of_all,
        "routable_by_layer": of_routable,
        "by_band": dict(zip(analysis.bands.names, of_bands, strict=True)),
    }


def json_numbers(values: np.ndarray) -> list[float | None]:
    """Return numbers, [n], as JSON values; NaN, which JSON does not have, becomes None."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _cell(value: Any) -> Any:
    """Return a value as it is written; NaN becomes an empty cell."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value


def _tables(analysis: Analysis) -> dict[str, Iterable[Row]]:
    """Return the rows of each CSV file."""
    shape, bands, pieces, statistics = analysis.shape, analysis.bands, analysis.probe.pieces, analysis.statistics
    capacity = partial(expert_capacity, analysis.micro_batch_tokens, shape.topk, shape.num_experts)
    # The cells that identify the places on each axis of the statistics.
    models = [{"checkpoint": model.name, "iteration": model.iteration} for model in analysis.models]
    changes = [{"from": before.name, "to": after.name} for before, after in pairwise(analysis.models)]
    layers = [{"layer": layer} for layer in shape.layers]
    experts = [{"expert": expert} for expert in range(shape.num_experts)]
    band_names = [{"band": name} for name in bands.names]
    groups = [{"tokens": name} for name in ("all", "routable", *bands.names)]
    factors = [{"capacity_factor": value, "capacity": capacity(value)} for value in analysis.settings.capacity_factors]
    ids = [
        {"id": number, "piece": pieces.get(number, ""), "band": bands.names[band], "occurrences": count}
        for number, count, band in zip(*(values.tolist() for values in analysis.counted_ids()), strict=True)
    ]
    # The last layer has no next layer.
    next_layer = np.pad(statistics["next_layer_information"], ((0, 0), (0, 1)), constant_values=np.nan)
    by_layer = {name: statistics[name] for name in _BY_LAYER} | {"next_layer_information": next_layer}
    return {
        "load.csv": _rows((models, layers, band_names, experts), assignments=statistics["load"]),
        "drops.csv": _rows((models, factors, layers), dropped_share=statistics["dropped"]),
        "entropy.csv": _rows((models, layers), bound=statistics["entropy_bound"], **by_layer),
        "specialisation.csv": _top_ids(analysis, models, layers, experts),
        "coactivation.csv": _pairs(analysis, models[-1]),
        "fluctuation.csv": _rows((changes, groups, layers), share=statistics["changed"][1:]),
        "distinct_experts.csv": _rows(
            (models, layers, ids), distinct=statistics["distinct"], effective=statistics["effective"]
        ),
    }


def _rows(axes: Sequence[Sequence[Row]], **columns: np.ndarray) -> Iterator[Row]:
    """Yield a row for each element of arrays.

    Args:
        axes: the cells that identify the places on each axis of the arrays.
        columns: arrays of the shape that `axes` has, by the names of their columns.
    """
    values = zip(*(array.ravel().tolist() for array in columns.values()), strict=True)
    for places, numbers in zip(product(*axes), values, strict=True):
        yield dict(ChainMap(*places)) | dict(zip(columns, numbers, strict=True))


def _top_ids(analysis: Analysis, *axes: Sequence[Row]) -> Iterator[Row]:
    """Yield the most frequent ids of each expert."""
    ids, counts, shares, lifts = (analysis.statistics[f"top_{name}"] for name in ("ids", "counts", "shares", "lifts"))
    ranks = [{"rank": rank} for rank in range(1, ids.shape[-1] + 1)]
    for row in _rows((*axes, ranks), id=ids, count=counts, share=shares, lift=lifts):
        if row["id"] >= 0:
            yield row | {"piece": analysis.probe.pieces.get(row["id"], "")}


def _pairs(analysis: Analysis, model: Row) -> Iterator[Row]:
    """Yield the share of the tokens with each pair of experts, in a layer or in consecutive layers, for one model."""
    layers, num_tokens = analysis.shape.layers, len(analysis.probe.token_ids)
    within = zip(layers, layers, np.triu(analysis.statistics["coactivation"][-1], k=1), strict=True)
    between = zip(layers, layers[1:], analysis.statistics["transitions"][-1], strict=False)
    for layer, other_layer, counts in (*within, *between):
        for expert, other in np.argwhere(counts).tolist():
            pair = {"layer": layer, "expert": expert, "other_layer": other_layer, "other_expert": other}
            yield model | pair | {"share": float(counts[expert, other] / num_tokens)}


def terminal_table(analysis: Analysis) -> Iterator[str]:
    """Yield the lines of a table for the terminal, with a row of means over the layers for each model."""
    statistics = analysis.statistics
    columns = (
        ("load", "max/mean", 10, ".2f", max_over_mean(statistics["load"].sum(axis=2))),
        ("dropped", f"at {analysis.settings.capacity_factors[0]:g}", 10, ".1%", statistics["dropped"][:, 0]),
        ("entropy", "", 9, ".3f", statistics["entropy"]),
        ("of at most", "", 12, ".3f", statistics["entropy_bound"]),
        ("one expert", "visible", 12, ".1%", statistics["single_expert_token_share"]),
        ("id–expert", "inform.", 11, ".3f", statistics["id_expert_information"]),
        ("experts", "an id", 9, ".2f", statistics["distinct"]),
        ("changed", "experts", 9, ".1%", statistics["changed"][:, 0]),
        ("of V > 1", "tokens", 10, ".1%", statistics["changed"][:, 1]),
    )
    yield "means over the layers; information and entropy in nats, per cent of tokens"
    yield f"{'model':<28}" + "".join(f"{title:>{width}}" for title, _, width, _, _ in columns)
    yield f"{'':<28}" + "".join(f"{subtitle:>{width}}" for _, subtitle, width, _, _ in columns)
    for position, model in enumerate(analysis.models):
        shown = columns if position > 0 else columns[:-2]  # the first model has no model before it
        cells = [f"{_mean(values[position]):>{width}{form}}" for _, _, width, form, values in shown]
        yield f"{model.name[-27:]:<28}" + "".join(cells)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    return float(mean_where(values.ravel(), ~np.isnan(values.ravel())))
