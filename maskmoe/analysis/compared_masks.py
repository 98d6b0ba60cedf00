"""Makes the routing masks that the simulation of dispatch compares."""

from dataclasses import replace
from enum import Enum
from functools import cache

from maskmoe.analysis.cluster import Cluster
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask


class Routing(Enum):
    """A way to choose the experts that an id sees; the values are names in tables and plots."""

    TOPK = "top-k"
    """Every id sees all experts."""
    MASK = "mask"
    """The given mask."""
    RANK_LOCAL = "rank-local mask"
    """A mask with all experts of an id on one rank."""
    NODE_LOCAL = "node-local mask"
    """A mask with all experts of an id on one node."""

    def num_places(self, cluster: Cluster) -> int:
        """Return the number of places among which the ids of a group are divided: ranks, nodes, or the whole group.

        The number is 0 if the group would have to be divided among nodes but does not fill whole nodes.
        """
        if self is Routing.NODE_LOCAL:
            return cluster.nodes_per_group or 0
        return cluster.ep_size if self is Routing.RANK_LOCAL else 1


def why_impossible(routing: Routing, mask: RoutingMask, layer: int, cluster: Cluster, topk: int) -> str | None:
    """Return the reason why a kind of routing is impossible in a layer on a cluster with this k, or None."""
    num_experts, ep_size = mask.num_experts, cluster.ep_size
    if cluster.num_gpus % ep_size:
        return f"{cluster.num_gpus:,} GPUs cannot be divided into groups of {ep_size:,} expert-parallel ranks"
    if num_experts % ep_size:
        return f"{num_experts:,} experts cannot be divided evenly over {ep_size:,} expert-parallel ranks"
    num_places = routing.num_places(cluster)
    if num_places == 0:
        return f"{ep_size:,} expert-parallel ranks do not fill whole nodes of {cluster.gpus_per_node:,}"
    available, needed = num_experts // num_places, min(mask.num_visible_of_layer(layer).max(), max(2, topk))
    if available < needed:
        place = "rank" if routing is Routing.RANK_LOCAL else "node"
        return f"a {place} has {available:,} of the experts, fewer than the {needed:,} that a frequent id needs"
    return None


@cache
def mask_of_layer(
    routing: Routing, mask: RoutingMask, layer: int, frequency: TokenFrequency, num_places: int
) -> RoutingMask:
    """Return the mask of one layer for a kind of routing.

    A rank-local or node-local mask is made from the frequencies of the ids. It copies two properties of the given
    mask's layer: the share of the tokens that see several experts, and the number of experts that they see, as far as a
    place has so many.

    Args:
        routing: the kind of routing, which must be possible, see `why_impossible`.
        mask: the given mask.
        layer: the layer of the given mask, from 0.
        frequency: counts of the ids.
        num_places: see `Routing.num_places`.
    """
    if routing is Routing.MASK:
        row_of_id, visible_bits = mask.table_of_layer(layer)
        return replace(mask, row_of_id=row_of_id[None], visible_bits=visible_bits[None], num_layers=1)
    if routing is Routing.TOPK:
        recipe = MaskRecipe.from_preset("smoe", mask.num_experts, num_layers=1)
        return build_routing_mask(recipe, frequency=frequency)
    num_visible = mask.num_visible_of_layer(layer)
    mass = frequency.occurrences[num_visible > 1].sum() / frequency.occurrences.sum()
    visible = min(int(num_visible.max()), mask.num_experts // num_places)
    recipe = MaskRecipe(
        mask.num_experts,
        num_layers=1,
        assignment="rank-local",
        frequent_mass=float(mass),
        frequent_visible_experts=visible if visible > 1 else None,
        seed=layer,
        expert_model_parallel_size=num_places,
    )
    return build_routing_mask(recipe, frequency=frequency, workers=1)
