"""The results as a table for the terminal, and as tidy CSV files: a row for each value."""

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.routing_analysis.analysis import Analysis, CheckpointStatistics
from maskmoe.routing_analysis.statistics import expert_capacity, max_over_mean

Row = tuple[Any, ...]


def terminal_table(analysis: Analysis) -> Iterator[str]:
    """A line for each model, of means over the layers."""
    factor = analysis.settings.capacity_factors[0]
    yield "means over the layers; information and entropy in nats, per cent of tokens"
    yield (
        f"{'model':<28}{'load':>10}{'dropped':>10}{'entropy':>9}{'of at most':>12}{'one expert':>12}"
        f"{'id–expert':>11}{'experts':>9}{'changed':>9}{'of V > 1':>10}"
    )
    yield (
        f"{'':<28}{'max/mean':>10}{f'at {factor:g}':>10}{'':>9}{'':>12}{'visible':>12}{'inform.':>11}{'an id':>9}"
        f"{'experts':>9}{'tokens':>10}"
    )
    for position, checkpoint in enumerate(analysis.checkpoints):
        entropy = checkpoint.entropy
        values = (
            f"{_mean(max_over_mean(checkpoint.load.sum(axis=1))):>10.2f}{_mean(checkpoint.dropped[0]):>10.1%}",
            f"{_mean(entropy.mean):>9.3f}{_mean(entropy.bound):>12.3f}{_mean(entropy.single_expert_token_share):>12.1%}",
            f"{_mean(checkpoint.id_information):>11.3f}{_mean(checkpoint.distinct_experts.distinct):>9.2f}",
            *_changed(analysis, position),
        )
        yield f"{checkpoint.name[-27:]:<28}" + "".join(values)


def _changed(analysis: Analysis, position: int) -> Iterator[str]:
    """The fluctuation since the model before, if there is one."""
    if position > 0:
        change = analysis.fluctuation[position - 1]
        yield f"{_mean(change.by_layer):>9.1%}{_mean(change.routable_by_layer):>10.1%}"


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def write_tables(analysis: Analysis, folder: Path) -> list[Path]:
    """Write the CSV files; returns their paths. Raises UserError where one cannot be written."""
    return [_write(folder / name, header, rows(analysis)) for name, (header, rows) in _TABLES.items()]


def _write(path: Path, header: Row, rows: Iterable[Row]) -> Path:
    with atomic_output(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
    return path


def _cell(value: Any) -> Any:
    """A value as it is written; what has none is empty."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value


def _of_checkpoint(checkpoint: CheckpointStatistics) -> Row:
    return checkpoint.name, checkpoint.iteration


def _load(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        for layer, of_layer in zip(analysis.layers, checkpoint.load.tolist(), strict=True):
            for band, of_band in zip(analysis.bands.names, of_layer, strict=True):
                for expert, assignments in enumerate(of_band):
                    yield (*_of_checkpoint(checkpoint), layer, band, expert, assignments)


def _drops(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        for factor, dropped in zip(analysis.settings.capacity_factors, checkpoint.dropped.tolist(), strict=True):
            capacity = expert_capacity(analysis.micro_batch_tokens, analysis.topk, analysis.num_experts, factor)
            for layer, share in zip(analysis.layers, dropped, strict=True):
                yield (*_of_checkpoint(checkpoint), layer, factor, capacity, share)


def _entropy(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        entropy = checkpoint.entropy
        next_layer = [*checkpoint.layer_information.tolist(), float("nan")]
        columns = (entropy.mean, entropy.bound, entropy.single_expert_token_share, entropy.first_weight)
        columns = (*columns, checkpoint.id_information)
        for row in zip(analysis.layers, *(column.tolist() for column in columns), next_layer, strict=True):
            yield (*_of_checkpoint(checkpoint), *row)


def _specialisation(analysis: Analysis) -> Iterator[Row]:
    for checkpoint in analysis.checkpoints:
        top = checkpoint.top_ids
        for place, number in np.ndenumerate(top.ids):
            if number >= 0:
                layer, expert, rank = place
                yield (
                    *(*_of_checkpoint(checkpoint), analysis.layers[layer], expert, rank + 1, int(number)),
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
            yield (*_of_checkpoint(checkpoint), layer, expert, other_layer, other, share)


def _fluctuation(analysis: Analysis) -> Iterator[Row]:
    for change in analysis.fluctuation:
        groups = {"all": change.by_layer, "routable": change.routable_by_layer}
        groups |= dict(zip(analysis.bands.names, change.by_band, strict=True))
        for tokens, of_layers in groups.items():
            for layer, share in zip(analysis.layers, of_layers.tolist(), strict=True):
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
                yield (*_of_checkpoint(checkpoint), layer, number, piece, band, *values)


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
