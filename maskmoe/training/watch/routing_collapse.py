"""Finds experts and ranks that get no tokens any more, and layers whose routing has become rigid; needs no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from maskmoe.errors import counted, listed
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask

_NO_ENTROPY = 1e-4
"""The entropy in nats below which routing is rigid: of two experts, one gets a probability of 1e-5 at most."""

_MOST_NAMED = 16


class Subject(NamedTuple):
    """Something of a layer, numbered from 0 as in Megatron's tags, that can collapse.

    Attributes:
        kind: "expert", "expert-parallel rank" or "routing entropy".
        number: Number of the expert or rank; 0 for an entropy.
    """

    layer: int
    kind: str
    number: int = 0


class RoutingCollapse:
    """Reports what has collapsed for several log intervals in a row, once for each event, and reports the recovery.

    Experts that no id of the mask sees are left out, because they never get tokens. Layers in which every token has one
    visible expert have no entropy.

    Args:
        intervals: The number of log intervals after which a collapse is reported.
        reachable: For each MoE layer, by its index, whether each expert is visible to any id.
    """

    def __init__(self, intervals: int, reachable: Mapping[int, Sequence[bool]], num_ranks: int = 1) -> None:
        self._intervals = intervals
        self._reachable = reachable
        self._num_ranks = num_ranks
        self._counts: dict[Subject, int] = {}
        self._reported: set[Subject] = set()

    def take(self, tokens_per_expert: Mapping[int, Sequence[float]], entropies: Mapping[int, float]) -> list[str]:
        """Take the routing of a log interval on all ranks, and return a line for each event.

        Args:
            tokens_per_expert: The tokens that each expert got, by the index of each layer that had tokens.
            entropies: The mean entropy of the masked probabilities, in nats, of layers in which a token had a choice.
        """
        begun, ended = [], []
        for layer, tokens in tokens_per_expert.items():
            collapsed = dict(self._collapsed(layer, tokens, entropies.get(layer)))
            for subject, is_named in collapsed.items():
                self._counts[subject] = self._counts.get(subject, 0) + 1
                if is_named and self._counts[subject] >= self._intervals and subject not in self._reported:
                    begun.append(subject)
            for subject in [known for known in self._counts if known.layer == layer and known not in collapsed]:
                del self._counts[subject]
                if subject in self._reported:
                    ended.append(subject)
        self._reported.update(begun)
        self._reported.difference_update(ended)
        return [*self._describe(begun, has_ended=False), *self._describe(ended, has_ended=True)]

    def _collapsed(self, layer: int, tokens: Sequence[float], entropy: float | None) -> Iterable[tuple[Subject, bool]]:
        """Yield what has collapsed in an interval, and whether a line may name it: no expert of a collapsed rank."""
        if entropy is not None and entropy < _NO_ENTROPY:
            yield Subject(layer, "routing entropy"), True
        size = len(tokens) // self._num_ranks
        for rank in range(self._num_ranks):
            experts = range(rank * size, (rank + 1) * size)
            reachable = [expert for expert in experts if self._reachable[layer][expert]]
            idle = [expert for expert in reachable if not tokens[expert]]
            is_rank_idle = self._num_ranks > 1 and bool(idle) and len(idle) == len(reachable)
            if is_rank_idle:
                yield Subject(layer, "expert-parallel rank", rank), True
            yield from ((Subject(layer, "expert", expert), not is_rank_idle) for expert in idle)

    def _describe(self, subjects: Iterable[Subject], has_ended: bool) -> Iterable[str]:
        """Yield a line for each layer and kind of subject."""
        span, numbers = counted(self._intervals, "log interval"), dict[tuple[int, str], list[int]]()
        for layer, kind, number in sorted(subjects):
            numbers.setdefault((layer, kind), []).append(number)
        for (layer, kind), found in numbers.items():
            if kind == "routing entropy":
                state = "is above 0 again" if has_ended else f"has been 0 for {span}"
                yield f"MoE layer {layer}: the routing entropy {state}"
                continue
            names = f"{kind}{'s' if len(found) > 1 else ''} {listed([*map(str, found)], _MOST_NAMED)}"
            if has_ended:
                yield f"MoE layer {layer}: {names} {'get' if len(found) > 1 else 'gets'} tokens again"
            else:
                yield f"MoE layer {layer}: {names} got no token for {span}"


def reachable_experts(mask: RoutingMask, layers: FeedForwardLayers) -> dict[int, list[bool]]:
    """Return for each MoE layer of a model, by its index, whether each expert is visible to any id."""
    return {
        index: mask.visible_to_any_id(layers.table(index + 1, len(mask.row_of_id))).tolist()
        for index, has_experts in enumerate(layers.has_experts)
        if has_experts
    }
