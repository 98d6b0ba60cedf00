"""Simulates the dispatch of a dataset's tokens on any number of GPUs, with and without a routing mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial
from itertools import product

import numpy as np
from dispatch_traffic import NO_EXPERT, Cluster, Exchange, Sending, VisibleLists, Workload, exchanges, rows_to_ranks
from tqdm import tqdm

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, expected_expert_load, heaviest_shares
from maskmoe.routing_mask.mask import RoutingMask


class Routing(Enum):
    """A way to choose the experts that an id sees; the values are names in tables and plots."""

    TOPK = "top-k"
    """Every id sees all experts."""
    MASK = "mask"
    """The given mask."""
    RANK_LOCAL = "rank-local mask"
    """A mask with all experts of an id on one rank."""
    HOT_LOCAL = "rank-local, hot ids local"
    """A rank-local mask, but every rank has the experts of the ids that are more than one rank's share of the load."""
    NODE_LOCAL = "node-local mask"
    """A mask with all experts of an id on one node."""

    def num_places(self, cluster: Cluster) -> int:
        """Return the number of places among which the ids of a group are divided: ranks, nodes, or the whole group.

        The number is 0 if the group would have to be divided among nodes but does not fill whole nodes.
        """
        if self is Routing.NODE_LOCAL:
            return cluster.nodes_per_group or 0
        return cluster.ep_size if self in (Routing.RANK_LOCAL, Routing.HOT_LOCAL) else 1


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
        place = "node" if routing is Routing.NODE_LOCAL else "rank"
        return f"a {place} has {available:,} of the experts, fewer than the {needed:,} that a frequent id needs"
    return None


@cache
def mask_of_layer(
    routing: Routing, mask: RoutingMask, layer: int, frequency: TokenFrequency, num_places: int, topk: int
) -> RoutingMask:
    """Return the mask of one layer for a kind of routing.

    A rank-local or node-local mask is made from the frequencies of the ids. It copies two properties of the given
    mask's layer: the share of the tokens that see several experts, and the number of experts that they see, as far as a
    place has so many.

    Args:
        routing: The kind of routing, which must be possible, see `why_impossible`.
        mask: The given mask.
        layer: The layer of the given mask, from 0.
        frequency: Counts of the ids.
        num_places: See `Routing.num_places`.
        topk: K, the largest number of experts of a token.
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
        topk=topk,
    )
    return build_routing_mask(recipe, frequency=frequency, workers=1)


# The ways to dispatch that are compared for each kind of routing. A mask that allows it is planned instead of one copy.
_SENDINGS = {
    Routing.TOPK: (Sending.STOCK, Sending.ONE_COPY, Sending.NODE_COPY),
    Routing.MASK: (Sending.STOCK, Sending.ONE_COPY, Sending.NODE_COPY),
    Routing.RANK_LOCAL: (Sending.PLANNED,),
    Routing.HOT_LOCAL: (Sending.PLANNED,),
    Routing.NODE_LOCAL: (Sending.ONE_COPY, Sending.NODE_COPY),
}


@dataclass(frozen=True)
class DispatchCost:
    """Cost of dispatch in one layer and one step of one micro-batch, forward and backward, without recomputation.

    Each figure is NaN if the case is impossible.

    Attributes:
        num_gpus: Number of ranks.
        ep_size: Number of expert-parallel ranks.
        topk: K, the largest number of experts of a token.
        variant: The way to choose the experts that an id sees, and the way to dispatch tokens.
        impossible: Reason why the case is impossible; empty if it is possible.
        bytes_own: Bytes that a rank puts into all collectives for itself; mean over ranks.
        bytes_node: Bytes that a rank puts into all collectives for other GPUs of its node; mean over ranks.
        bytes_across: Bytes that a rank puts into all collectives for other nodes; mean over ranks.
        rows: Tokens that a rank receives in one all-to-all, including its own; mean over ranks.
        computed: Tokens times experts that a rank computes; mean over ranks.
        load_max_over_mean: Maximum over mean of the tokens times experts that the ranks compute.
        expected_load_max_over_mean: The same ratio as expected from the frequencies of the dataset's ids.
        all_to_all_seconds: Time of one all-to-all of hidden states.
        seconds: Time of all collectives.
    """

    num_gpus: int
    ep_size: int
    topk: int
    variant: str
    impossible: str = ""
    bytes_own: float = np.nan
    bytes_node: float = np.nan
    bytes_across: float = np.nan
    rows: float = np.nan
    computed: float = np.nan
    load_max_over_mean: float = np.nan
    expected_load_max_over_mean: float = np.nan
    all_to_all_seconds: float = np.nan
    seconds: float = np.nan


@dataclass(frozen=True, eq=False)
class Simulation:
    """Routes tokens, counts the rows that ranks would send each other, and computes the time of the exchanges.

    Attributes:
        mask: The given routing mask.
        layer: The layer to simulate, from 0.
        frequency: Counts of the ids of the dataset.
        tokens: Ids of the whole dataset, integer [dataset tokens].
        workload: Sizes of the data.
        seed: Seed of the choices of experts, not negative.

    Raises:
        UserError: The dataset has fewer tokens than one rank needs.
    """

    mask: RoutingMask
    layer: int
    frequency: TokenFrequency
    tokens: np.ndarray
    workload: Workload
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.tokens) < self.workload.tokens_per_rank:
            raise UserError(
                f"the dataset has {len(self.tokens):,} tokens, fewer than the {self.workload.tokens_per_rank:,} of one "
                "rank; give fewer tokens to each rank or use a larger dataset"
            )

    def run(self, clusters: Sequence[Cluster], topks: Sequence[int], progress: bool = False) -> list[DispatchCost]:
        """Simulate all kinds of routing and ways to dispatch for each k and each cluster, in this order.

        Args:
            clusters: The clusters.
            topks: The values of k, at most the number of experts.
            progress: Whether to show a progress bar on stderr if the work takes more than half a second.
        """
        cases = list(product(topks, clusters, Routing))
        bar = tqdm(cases, unit="case", desc="dispatching", delay=0.5, disable=not progress)
        return [cost for case in bar for cost in self._costs(*case)]

    def _costs(self, topk: int, cluster: Cluster, routing: Routing) -> list[DispatchCost]:
        """Return the costs of all ways to dispatch with one kind of routing."""
        case = partial(DispatchCost, cluster.num_gpus, cluster.ep_size, topk)
        sendings = [each for each in _SENDINGS[routing] if each is not Sending.NODE_COPY or cluster.nodes_per_group]
        if reason := why_impossible(routing, self.mask, self.layer, cluster, topk):
            return [case(_name(routing, sending), impossible=reason) for sending in sendings]
        # Dispatch is planned only if the destination of every token is known in every layer.
        mask = mask_of_layer(routing, self.mask, self.layer, self.frequency, routing.num_places(cluster), topk)
        if (self.mask if routing is Routing.MASK else mask).is_rank_local(cluster.ep_size):
            sendings = [Sending.PLANNED if sending is Sending.ONE_COPY else sending for sending in sendings]
        # Route the tokens once. The random stream depends on the case, not on what else is simulated.
        key = (topk, cluster.num_gpus, cluster.ep_size, list(Routing).index(routing), self.layer)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        is_hot = np.zeros(mask.vocab_size, bool)
        if routing is Routing.HOT_LOCAL:
            is_hot = heaviest_shares(mask, self.frequency.occurrences, topk)[0] > 1 / cluster.ep_size
        rows = self.route(cluster, mask, topk, rng, is_hot)
        load = cluster.reverse(rows[Sending.STOCK]).sum(axis=1)  # [ranks]
        used = np.minimum(mask.num_visible_of_layer(0), topk) * self.frequency.occurrences  # [vocab]
        expert_load = expected_expert_load(mask, self.frequency.occurrences * ~is_hot, topk)
        expected_load = expert_load.reshape(cluster.ep_size, -1).sum(axis=1) + used[is_hot].sum() / cluster.ep_size
        costs = []
        for sending in sendings:
            collectives = exchanges(sending, rows[sending], self.workload, cluster, topk)
            seconds = [cluster.seconds(exchange.rows, exchange.bytes_per_row) for exchange in collectives]
            cost = case(
                _name(routing, sending),
                "",
                *_sent_bytes(cluster, collectives),
                rows=rows[Sending.STOCK if sending is Sending.STOCK else Sending.ONE_COPY].sum() / cluster.num_gpus,
                computed=load.mean(),
                load_max_over_mean=load.max() / load.mean(),
                expected_load_max_over_mean=expected_load.max() / expected_load.mean(),
                all_to_all_seconds=seconds[0],
                seconds=sum(exchange.calls * time for exchange, time in zip(collectives, seconds, strict=True)),
            )
            costs.append(cost)
        return costs

    def route(
        self, cluster: Cluster, mask: RoutingMask, topk: int, rng: np.random.Generator, is_hot: np.ndarray
    ) -> dict[Sending, np.ndarray]:
        """Draw the experts of all tokens under a mask of one layer, and count the rows of one all-to-all.

        Each rank has consecutive tokens of the dataset, from a start of its own. The starts are spread evenly over the
        dataset. If the ranks together need more tokens than the dataset has, their parts overlap. The ids `is_hot`,
        bool [vocab], use experts of their own rank.

        Returns:
            The rows of each way to send, int64 [ranks, ranks of a group].
        """
        visible, experts_per_rank = VisibleLists(mask), mask.num_experts // cluster.ep_size
        num_nodes = cluster.nodes_per_group or 1
        per_expert, per_rank = np.empty((2, cluster.num_gpus, cluster.ep_size), np.int64)
        per_node = np.empty((cluster.num_gpus, num_nodes), np.int64)
        for rank in range(cluster.num_gpus):
            token_ids = self.tokens_of_rank(rank, cluster.num_gpus)
            experts, stays = visible.draw(token_ids, topk, rng), is_hot[token_ids]  # [k, tokens], [tokens]
            sent = np.where(stays, NO_EXPERT, experts)
            per_expert[rank], per_rank[rank] = rows_to_ranks(sent, cluster.ep_size, experts_per_rank)
            per_expert[rank, rank % cluster.ep_size] += (experts[:, stays] != NO_EXPERT).sum()
            per_rank[rank, rank % cluster.ep_size] += stays.sum()
            per_node[rank] = rows_to_ranks(sent, num_nodes, mask.num_experts // num_nodes)[1]
        return {
            Sending.STOCK: per_expert,
            Sending.ONE_COPY: per_rank,
            Sending.PLANNED: per_rank,
            Sending.NODE_COPY: cluster.through_nodes(per_rank, per_node),
        }

    def tokens_of_rank(self, rank: int, num_ranks: int) -> np.ndarray:
        """Return the token ids of one of all ranks, [tokens per rank] in the dataset's dtype."""
        start = rank * len(self.tokens) // num_ranks
        return np.asarray(self.tokens)[np.arange(start, start + self.workload.tokens_per_rank) % len(self.tokens)]


def _sent_bytes(cluster: Cluster, collectives: Sequence[Exchange]) -> list[float]:
    """Return the bytes that a rank puts into all collectives of a layer by `Reach`, as means over the ranks."""
    # Calls of the opposite direction swap sent and received rows, which have the same mean over ranks.
    sent = [cluster.sent_by_reach(exchange.rows).mean(axis=0) for exchange in collectives]  # [reaches] each
    sizes = [exchange.calls * exchange.bytes_per_row for exchange in collectives]
    return np.dot(sizes, sent).tolist()


def _name(routing: Routing, sending: Sending) -> str:
    """Return the name of a kind of routing with a way to send."""
    return f"{routing.value}, {sending.value}"
