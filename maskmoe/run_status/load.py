"""Reads the load of the experts of each MoE layer from the scalars of a run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from maskmoe.run_report.history import Series

_TAG = re.compile(r"moe/(expert_load_max_over_mean|rank_load_max_over_mean|routing_entropy)_layer_(\d{1,6})")


@dataclass(frozen=True)
class LayerLoad:
    """The newest load of one MoE layer; what the run has not logged is None.

    Attributes:
        layer: index of the layer, from 0 as in Megatron's tags.
        iteration: the iteration of the values.
        expert: tokens of the busiest expert, divided by the mean of the layer's experts.
        rank: tokens of the busiest expert-parallel rank, divided by the mean of the ranks.
        entropy: entropy of the masked probabilities in nats.
    """

    layer: int
    iteration: int
    expert: float | None
    rank: float | None
    entropy: float | None


def read_loads(series: Mapping[str, Series]) -> tuple[LayerLoad, ...]:
    """Return the newest load of each layer in the order of the layers.

    Args:
        series: the scalars of the run by tag.
    """
    values: dict[int, dict[str, tuple[int, float]]] = {}
    for tag, each in series.items():
        if (match := _TAG.fullmatch(tag)) and each.newest is not None:
            values.setdefault(int(match[2]), {})[match[1]] = each.newest
    loads = []
    for layer, of_layer in sorted(values.items()):
        iteration = max(step for step, _ in of_layer.values())
        # A start on one rank logs no load of ranks; the values of an earlier start do not count.
        newest = {name: value for name, (step, value) in of_layer.items() if step == iteration}
        names = ("expert_load_max_over_mean", "rank_load_max_over_mean", "routing_entropy")
        expert, rank, entropy = (newest.get(name) for name in names)
        loads.append(LayerLoad(layer, iteration, expert, rank, entropy))
    return tuple(loads)
