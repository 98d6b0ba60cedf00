"""Finds experts that get no tokens any more, and layers whose routing has become rigid; needs no torch."""

from collections.abc import Iterable, Mapping, Sequence

from maskmoe.errors import counted, listed
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask

_NO_ENTROPY = 1e-4
"""The entropy in nats below which routing is rigid: of two experts, one gets a probability of 1e-5 at most."""

_MOST_NAMED = 16


class RoutingCollapse:
    """Reports what has collapsed for several log intervals in a row, once until it recovers.

    Experts that no id of the mask sees are left out, because they never get tokens. Layers in which every token has one
    visible expert have no entropy.

    Args:
        intervals: The number of log intervals after which a collapse is reported.
        reachable: For each MoE layer, by its index, whether each expert is visible to any id.
    """

    def __init__(self, intervals: int, reachable: Mapping[int, Sequence[bool]]) -> None:
        self._intervals = intervals
        self._reachable = reachable
        # The log intervals in a row of each collapsed expert, by layer and number, and of each rigid layer (None).
        self._counts: dict[tuple[int, int | None], int] = {}

    def take(self, tokens_per_expert: Mapping[int, Sequence[float]], entropies: Mapping[int, float]) -> list[str]:
        """Take the routing of a log interval on all ranks, and return a line for each new collapse of a layer.

        Args:
            tokens_per_expert: The tokens that each expert got, by the index of each layer that had tokens.
            entropies: The mean entropy of the masked probabilities, in nats, of layers in which a token had a choice.
        """
        lines, span = [], counted(self._intervals, "log interval")
        for layer, tokens in tokens_per_expert.items():
            idle = [e for e, number in enumerate(tokens) if not number and self._reachable[layer][e]]
            if experts := self._count(layer, range(len(tokens)), idle):
                names = f"expert{'s' if len(experts) > 1 else ''} {listed([*map(str, experts)], _MOST_NAMED)}"
                lines.append(f"MoE layer {layer}: {names} got no token for {span}")
            if self._count(layer, (None,), [None] if entropies.get(layer, 1.0) < _NO_ENTROPY else []):
                lines.append(f"MoE layer {layer}: the routing entropy has been 0 for {span}")
        return lines

    def _count[Number: int | None](
        self, layer: int, numbers: Iterable[Number], collapsed: Sequence[Number]
    ) -> list[Number]:
        """Count an interval of the `numbers` that have collapsed; return the numbers that are to be reported."""
        counts = {(layer, number): self._counts.get((layer, number), 0) + 1 for number in collapsed}
        for number in numbers:
            self._counts.pop((layer, number), None)
        self._counts |= counts
        return [number for number in collapsed if counts[layer, number] == self._intervals]


def reachable_experts(mask: RoutingMask, layers: FeedForwardLayers) -> dict[int, list[bool]]:
    """Return for each MoE layer of a model, by its index, whether each expert is visible to any id."""
    return {
        index: mask.visible_to_any_id(layers.table(index + 1, len(mask.row_of_id))).tolist()
        for index, has_experts in enumerate(layers.has_experts)
        if has_experts
    }
