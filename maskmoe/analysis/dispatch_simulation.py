"""Simulates the dispatch of a dataset's tokens on any number of GPUs, with and without a routing mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from tqdm import tqdm

from maskmoe.analysis.cluster import Cluster
from maskmoe.analysis.compared_masks import Routing, mask_of_layer, why_impossible
from maskmoe.analysis.dispatch_traffic import Exchange, VisibleLists, Workload, exchanges, rows_to_ranks
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import TokenFrequency, expected_expert_load
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.dispatch.kind import DispatchKind

# The ways to dispatch that are compared for each kind of routing. A mask that allows it is planned instead of one copy.
_DISPATCHES = {
    Routing.TOPK: (DispatchKind.STOCK, DispatchKind.ONE_COPY),
    Routing.MASK: (DispatchKind.STOCK, DispatchKind.ONE_COPY),
    Routing.RANK_LOCAL: (DispatchKind.PLANNED,),
    Routing.NODE_LOCAL: (DispatchKind.ONE_COPY,),
}
_NAMES = {
    DispatchKind.STOCK: "row per expert",
    DispatchKind.ONE_COPY: "one copy",
    DispatchKind.PLANNED: "planned",
}


@dataclass(frozen=True)
class DispatchCost:
    """Cost of dispatch in one layer and one step of one micro-batch, forward and backward, without recomputation.

    Each figure is NaN if the case is impossible.

    Attributes:
        num_gpus: number of ranks.
        ep_size: number of expert-parallel ranks.
        topk: k, the largest number of experts of a token.
        variant: the way to choose the experts that an id sees, and the way to dispatch tokens.
        impossible: reason why the case is impossible; empty if it is possible.
        bytes_own: bytes that a rank puts into all collectives for itself; mean over ranks.
        bytes_node: bytes that a rank puts into all collectives for other GPUs of its node; mean over ranks.
        bytes_across: bytes that a rank puts into all collectives for other nodes; mean over ranks.
        rows: hidden states that a rank receives in one all-to-all, including those from itself; mean over ranks.
        load_max_over_mean: maximum over mean of the tokens times experts that the ranks compute.
        expected_load_max_over_mean: the same ratio as expected from the frequencies of the dataset's ids.
        all_to_all_seconds: time of one all-to-all of hidden states.
        seconds: time of all collectives.
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
    load_max_over_mean: float = np.nan
    expected_load_max_over_mean: float = np.nan
    all_to_all_seconds: float = np.nan
    seconds: float = np.nan


@dataclass(frozen=True, eq=False)
class Simulation:
    """Routes tokens, counts the rows that ranks would send each other, and computes the time of the exchanges.

    Attributes:
        mask: the given routing mask.
        layer: the layer to simulate, from 0.
        frequency: counts of the ids of the dataset.
        tokens: ids of the whole dataset, integer [dataset tokens].
        workload: sizes of the data.
        seed: seed of the choices of experts, not negative.

    Raises:
        UserError: the dataset has fewer tokens than one rank needs.
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
            clusters: the clusters.
            topks: the values of k, at most the number of experts.
            progress: whether to show a progress bar on stderr if the work takes more than half a second.
        """
        cases = list(product(topks, clusters, Routing))
        bar = tqdm(cases, unit="case", desc="dispatching", delay=0.5, disable=not progress)
        return [cost for case in bar for cost in self._costs(*case)]

    def _costs(self, topk: int, cluster: Cluster, routing: Routing) -> list[DispatchCost]:
        """Return the costs of all ways to dispatch with one kind of routing."""
        case = partial(DispatchCost, cluster.num_gpus, cluster.ep_size, topk)
        dispatches = _DISPATCHES[routing]
        if reason := why_impossible(routing, self.mask, self.layer, cluster, topk):
            return [case(_name(routing, dispatch), impossible=reason) for dispatch in dispatches]
        # Dispatch is planned only if the destination of every token is known in every layer.
        mask = mask_of_layer(routing, self.mask, self.layer, self.frequency, routing.num_places(cluster))
        if (self.mask if routing is Routing.MASK else mask).rank_of_rows(cluster.ep_size) is not None:
            dispatches = [DispatchKind.PLANNED if way is DispatchKind.ONE_COPY else way for way in dispatches]
        # Route the tokens once. The random stream depends on the case, not on what else is simulated.
        key = (topk, cluster.num_gpus, cluster.ep_size, list(Routing).index(routing), self.layer)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        per_expert, per_rank = self.route(cluster, mask, topk, rng)
        load = cluster.reverse(per_expert).sum(axis=1)  # [ranks]
        expert_load = expected_expert_load(mask, self.frequency.occurrences, topk)
        expected_load = expert_load.reshape(cluster.ep_size, -1).sum(axis=1)  # [ranks of a group]
        costs = []
        for dispatch in dispatches:
            rows = per_expert if dispatch is DispatchKind.STOCK else per_rank
            collectives = exchanges(dispatch, rows, self.workload, cluster)
            seconds = [cluster.seconds(exchange.rows, exchange.bytes_per_row) for exchange in collectives]
            cost = case(
                _name(routing, dispatch),
                "",
                *_sent_bytes(cluster, collectives),
                rows=rows.sum() / cluster.num_gpus,
                load_max_over_mean=load.max() / load.mean(),
                expected_load_max_over_mean=expected_load.max() / expected_load.mean(),
                all_to_all_seconds=seconds[0],
                seconds=sum(exchange.calls * time for exchange, time in zip(collectives, seconds, strict=True)),
            )
            costs.append(cost)
        return costs

    def route(
        self, cluster: Cluster, mask: RoutingMask, topk: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw the experts of all tokens under a mask of one layer, and count the rows of one all-to-all.

        Each rank has consecutive tokens of the dataset, from a start of its own. The starts are spread evenly over the
        dataset. If the ranks together need more tokens than the dataset has, their parts overlap.

        Returns:
            The rows if a token is sent once for every selected expert, and the rows if a token is sent once to every
            rank that holds selected experts, int64 [ranks, ranks of a group] each.
        """
        visible, experts_per_rank = VisibleLists(mask), mask.num_experts // cluster.ep_size
        rows = np.empty((2, cluster.num_gpus, cluster.ep_size), np.int64)
        for rank in range(cluster.num_gpus):
            experts = visible.draw(self.tokens_of_rank(rank, cluster.num_gpus), topk, rng)
            rows[:, rank] = rows_to_ranks(experts, cluster.ep_size, experts_per_rank)
        return rows[0], rows[1]

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


def _name(routing: Routing, dispatch: DispatchKind) -> str:
    """Return the name of a kind of routing with a way to dispatch."""
    return f"{routing.value}, {_NAMES[dispatch]}"
