"""Writes the results of an analysis as a table for the terminal, and as tidy CSV files with a row for each value."""

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.routing_analysis.analysis import Analysis, CheckpointStatistics
from maskmoe.routing_analysis.statistics import expert_capacity, max_over_mean

Row = tuple[Any, ...]


def terminal_table(analysis: Analysis) -> Iterator[str]:
    """Yield the lines of a table for the terminal, with a row of means over the layers for each model."""
    capacity_factor = analysis.settings.capacity_factors[0]
    columns = (
        _Column("load", "max/mean", 10, ".2f"),
        _Column("dropped", f"at {capacity_factor:g}", 10, ".1%"),
        _Column("entropy", "", 9, ".3f"),
        _Column("of at most", "", 12, ".3f"),
        _Column("one expert", "visible", 12, ".1%"),
        _Column("id–expert", "inform.", 11, ".3f"),
        _Column("experts", "an id", 9, ".2f"),
        _Column("changed", "experts", 9, ".1%"),
        _Column("of V > 1", "tokens", 10, ".1%"),
    )
    yield "means over the layers; information and entropy in nats, per cent of tokens"
    yield f"{'model':<28}" + "".join(f"{column.title:>{column.width}}" for column in columns)
    yield f"{'':<28}" + "".join(f"{column.subtitle:>{column.width}}" for column in columns)
    for position, checkpoint in enumerate(analysis.checkpoints):
        values = [
            max_over_mean(checkpoint.load.sum(axis=1)),
            checkpoint.dropped[0],
            checkpoint.entropy.mean,
            checkpoint.entropy.bound,
            checkpoint.entropy.single_expert_token_share,
            checkpoint.id_information,
            checkpoint.distinct_experts.distinct,
        ]
        if position > 0:  # the first model has no model before it
            change = analysis.fluctuation[position - 1]
            values += [change.by_layer, change.routable_by_layer]
        cells = [
            f"{_mean(value):>{column.width}{column.format}}" for column, value in zip(columns, values, strict=False)
        ]
        yield f"{checkpoint.name[-27:]:<28}" + "".join(cells)


@dataclass(frozen=True)
class _Column:
    """A column of the table for the terminal: its heading in two lines, its width, and the format of its numbers."""

    title: str
    subtitle: str
    width: int
    format: str


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def write_tables(analysis: Analysis, folder: Path) -> list[Path]:
    """Write the CSV files, and return their paths.

    Raises:
        UserError: a file cannot be written.
    """
    return [_write(folder / name, header, rows(analysis)) for name, (header, rows) in _TABLES.items()]


def _write(path: Path, header: Row, rows: Iterable[Row]) -> Path:
    """Write one CSV file."""
    with atomic_output(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
    return path


def _cell(value: Any) -> Any:
    """Return a value as it is written; NaN becomes an empty cell."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value


def _key(checkpoint: CheckpointStatistics) -> Row:
    """Return the first cells of every row about a checkpoint."""
    return checkpoint.name, checkpoint.iteration


def _load(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        for layer, load_of_bands in zip(analysis.layers, checkpoint.load.tolist(), strict=True):
            for band, load_of_experts in zip(analysis.bands.names, load_of_bands, strict=True):
                for expert, assignments in enumerate(load_of_experts):
                    yield (*_key(checkpoint), layer, band, expert, assignments)


def _drops(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        for factor, dropped in zip(analysis.settings.capacity_factors, checkpoint.dropped.tolist(), strict=True):
            capacity = expert_capacity(analysis.micro_batch_tokens, analysis.topk, analysis.num_experts, factor)
            for layer, share in zip(analysis.layers, dropped, strict=True):
                yield (*_key(checkpoint), layer, factor, capacity, share)


def _entropy(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        entropy = checkpoint.entropy
        next_layer = [*checkpoint.layer_information.tolist(), float("nan")]
        columns = (entropy.mean, entropy.bound, entropy.single_expert_token_share, entropy.first_weight)
        columns = (*columns, checkpoint.id_information)
        for row in zip(analysis.layers, *(column.tolist() for column in columns), next_layer, strict=True):
            yield (*_key(checkpoint), *row)


def _specialisation(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        top = checkpoint.top_ids
        for place, number in np.ndenumerate(top.ids):
            if number >= 0:
                layer, expert, rank = place
                yield (
                    *(*_key(checkpoint), analysis.layers[layer], expert, rank + 1, int(number)),
                    analysis.probe.pieces.get(int(number), ""),
                    *(int(top.counts[place]), float(top.shares[place]), float(top.lifts[place])),
                )


def _coactivation(analysis: Analysis) -> Iterator[Row]:
    checkpoint, num_tokens = analysis.checkpoints[-1], len(analysis.probe.token_ids)
    within = zip(analysis.layers, analysis.layers, np.triu(checkpoint.coactivation, k=1), strict=True)
    between = zip(analysis.layers, analysis.layers[1:], checkpoint.transitions, strict=False)
    for layer, other_layer, counts in (*within, *between):
        for expert, other in np.argwhere(counts).tolist():
            share = float(counts[expert, other] / num_tokens)
            yield (*_key(checkpoint), layer, expert, other_layer, other, share)


def _fluctuation(analysis: Analysis) -> Iterator[Row]:
    for change in analysis.fluctuation:
        groups = {"all": change.by_layer, "routable": change.routable_by_layer}
        groups |= dict(zip(analysis.bands.names, change.by_band, strict=True))
        for tokens, shares in groups.items():
            for layer, share in zip(analysis.layers, shares.tolist(), strict=True):
                yield change.before, change.after, layer, tokens, share


def _distinct_experts(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        of_ids = checkpoint.distinct_experts
        occurrences = np.bincount(analysis.probe.token_ids)[of_ids.ids]
        for layer, distinct, effective in zip(analysis.layers, of_ids.distinct, of_ids.effective, strict=True):
            for row in zip(of_ids.ids, occurrences, distinct, effective, strict=True):
                number, *values = (value.item() for value in row)
                band = analysis.bands.names[analysis.bands.band_of_id[number]]
                piece = analysis.probe.pieces.get(number, "")
                yield (*_key(checkpoint), layer, number, piece, band, *values)


_CHECKPOINT = ("checkpoint", "iteration")
_INFORMATION = ("id_expert_information", "next_layer_information")
_TABLES: dict[str, tuple[Row, Callable[[Analysis], Iterator[Row]]]] = {
    "load.csv": ((*_CHECKPOINT, "layer", "band", "expert", "assignments"), _load),
    "drops.csv": ((*_CHECKPOINT, "layer", "capacity_factor", "capacity", "dropped_share"), _drops),
    "entropy.csv": (
        (*_CHECKPOINT, "layer", "entropy", "bound", "single_expert_token_share", "first_weight", *_INFORMATION),
        _entropy,
    ),
    "specialisation.csv": (
        (*_CHECKPOINT, "layer", "expert", "rank", "id", "piece", "count", "share", "lift"),
        _specialisation,
    ),
    "coactivation.csv": ((*_CHECKPOINT, "layer", "expert", "other_layer", "other_expert", "share"), _coactivation),
    "fluctuation.csv": (("from", "to", "layer", "tokens", "share"), _fluctuation),
    "distinct_experts.csv": (
        (*_CHECKPOINT, "layer", "id", "piece", "band", "occurrences", "distinct", "effective"),
        _distinct_experts,
    ),
}
TABLE_NAMES = tuple(_TABLES)
