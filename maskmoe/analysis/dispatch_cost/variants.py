"""Define the compared variants and make their routing masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import NamedTuple

import numpy as np

from maskmoe.analysis.dispatch_cost.cluster import Layout
from maskmoe.routing_mask import MaskRecipe, RoutingMask, TokenFrequency, build_routing_mask
from maskmoe.transformer.dispatch.kind import DispatchKind


class Routing(Enum):
    """A way to choose the experts that an id sees."""

    TOPK = "all experts"
    MASK = "the given mask"
    RANK_LOCAL = "a mask with all experts of an id on one rank"
    NODE_LOCAL = "a mask with all experts of an id on one node"


@dataclass(frozen=True)
class Variant:
    """A combination of routing and dispatch.

    Attributes:
        name: Name in tables and plots.
        routing: The way to choose the experts that ids see.
        dispatch: The way to dispatch tokens. `ONE_COPY` becomes `PLANNED` if the mask allows it, as in training.
    """

    name: str
    routing: Routing
    dispatch: DispatchKind


VARIANTS = (
    Variant("top-k, row per expert", Routing.TOPK, DispatchKind.STOCK),
    Variant("top-k, one copy", Routing.TOPK, DispatchKind.ONE_COPY),
    Variant("mask, row per expert", Routing.MASK, DispatchKind.STOCK),
    Variant("mask, one copy", Routing.MASK, DispatchKind.ONE_COPY),
    Variant("rank-local mask, planned", Routing.RANK_LOCAL, DispatchKind.ONE_COPY),
    Variant("node-local mask, one copy", Routing.NODE_LOCAL, DispatchKind.ONE_COPY),
)


class _LayerProperties(NamedTuple):
    """The largest number of experts that an id sees in a layer, and the share of the tokens that see several."""

    max_visible: int
    frequent_mass: float

    @classmethod
    def of(cls, mask: RoutingMask, layer: int, occurrences: np.ndarray) -> "_LayerProperties":
        """Return the properties of a layer of a mask; layers count from 0, `occurrences` is `[vocab]`."""
        num_visible = mask.num_visible_of_layer(layer)
        return cls(int(num_visible.max()), float(occurrences[num_visible > 1].sum() / occurrences.sum()))


class Masks:
    """The routing masks of each kind of routing, one mask of a single layer for each simulated layer.

    Rank-local and node-local masks are built for each number of ranks or nodes, from the frequencies of the ids. Each
    layer copies two properties of the given mask's layer: the share of the tokens that see several experts and the
    number of these experts, which is lower if one rank or node holds fewer experts.

    Args:
        mask: The given mask.
        layers: The simulated layers, counted from 0.
        frequency: Token counts of the dataset.

    Attributes:
        frequency: Token counts of the dataset.
    """

    def __init__(self, mask: RoutingMask, layers: Sequence[int], frequency: TokenFrequency) -> None:
        self._mask, self.frequency = mask, frequency
        self._layers = [0] if mask.is_shared else sorted(set(layers))
        self._properties = [_LayerProperties.of(mask, layer, frequency.occurrences) for layer in self._layers]
        # One build for all layouts with the same number of places, and for all k.
        self._build = cache(self._build_masks)

    def num_layers(self, routing: Routing) -> int:
        """Return the number of masks that `layers_of` returns."""
        return 1 if routing is Routing.TOPK else len(self._layers)

    def layers_of(self, routing: Routing, layout: Layout) -> list[RoutingMask]:
        """Return a mask of one layer for each simulated layer, or a single mask if all layers are equal.

        Call `why_impossible` first: the masks must be possible.
        """
        return self._build(routing, _num_places(routing, layout))

    def why_impossible(self, routing: Routing, layout: Layout, topk: int) -> str | None:
        """Return the reason why these masks are impossible for these ranks and this k, or None."""
        num_experts, ep_size = self._mask.num_experts, layout.ep_size
        if layout.num_gpus % ep_size:
            return f"{layout.num_gpus:,} GPUs cannot be divided into groups of {ep_size:,} expert-parallel ranks"
        if num_experts < ep_size:
            return f"{num_experts:,} experts are fewer than {ep_size:,} expert-parallel ranks"
        if num_experts % ep_size:
            return f"{num_experts:,} experts cannot be divided evenly over {ep_size:,} expert-parallel ranks"
        num_places = _num_places(routing, layout)
        if num_places == 0:
            return f"{ep_size:,} expert-parallel ranks do not fill whole nodes of {layout.gpus_per_node:,}"
        most_visible = max(properties.max_visible for properties in self._properties)
        available, needed = num_experts // num_places, min(most_visible, max(2, topk))
        if available < needed:
            place = "rank" if routing is Routing.RANK_LOCAL else "node"
            return f"a {place} has {available:,} of the experts, fewer than the {needed:,} that a frequent id needs"
        return None

    def _build_masks(self, routing: Routing, num_places: int) -> list[RoutingMask]:
        """Build the masks of a kind of routing, with all experts of an id on one of `num_places` ranks or nodes."""
        num_experts, num_layers = self._mask.num_experts, self.num_layers(routing)
        if routing is Routing.MASK:
            return [_one_layer(self._mask, layer) for layer in self._layers]
        if routing is Routing.TOPK:
            recipe = MaskRecipe.from_preset("smoe", num_experts, num_layers)
            return [_one_layer(build_routing_mask(recipe, frequency=self.frequency, workers=1), 0)]
        # Layers with the same properties are layers of one mask.
        masks = {}
        for properties in set(self._properties):
            num_visible = min(properties.max_visible, num_experts // num_places)
            frequent_visible, seed = num_visible if num_visible > 1 else None, self._mask.provenance.seed
            recipe = MaskRecipe(
                num_experts, num_layers, "rank-local", properties.frequent_mass, frequent_visible, seed, num_places
            )
            masks[properties] = build_routing_mask(recipe, frequency=self.frequency, workers=1)
        return [_one_layer(masks[properties], layer) for layer, properties in enumerate(self._properties)]


def _num_places(routing: Routing, layout: Layout) -> int:
    """Return the number of places among which the ids of a group are divided: ranks, nodes, or the whole group.

    The number is 0 if the group would have to be divided among nodes but does not fill whole nodes.
    """
    if routing is Routing.NODE_LOCAL:
        return layout.nodes_per_group or 0
    return layout.ep_size if routing is Routing.RANK_LOCAL else 1


def _one_layer(mask: RoutingMask, layer: int) -> RoutingMask:
    """Return a mask with a single layer of the given mask; layers count from 0."""
    row_of_id, visible_bits = mask.table_of_layer(layer)
    return replace(mask, row_of_id=row_of_id[None], visible_bits=visible_bits[None], num_layers=1)
