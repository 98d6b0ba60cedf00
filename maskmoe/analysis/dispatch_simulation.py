"""Simulates the dispatch of a dataset's tokens on any number of GPUs, with and without a routing mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from maskmoe.analysis.cluster import Cluster, Reach
from maskmoe.analysis.compared_masks import Routing, mask_of_layer, why_impossible
from maskmoe.analysis.dispatch_traffic import VisibleLists, Workload, exchanges, rows_to_ranks
from maskmoe.errors import UserError
from maskmoe.routing_mask import RoutingMask, TokenFrequency
from maskmoe.routing_mask.mask import expected_expert_load
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

    Each figure is a mean over the simulated layers, and NaN if the case is impossible.

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
        mask: the given routing mask, of all simulated layers.
        frequency: counts of the ids of the dataset.
        tokens: ids of the whole dataset, integer [dataset tokens].
        workload: sizes of the data.
        seed: seed of the choices of experts, not negative.

    Raises:
        UserError: the dataset has fewer tokens than one rank needs.
    """

    mask: RoutingMask
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
        dispatches = _DISPATCHES[routing]
        if reason := why_impossible(routing, self.mask, cluster, topk):
            return [_cost(cluster, topk, routing, dispatch, impossible=reason) for dispatch in dispatches]
        # Without a mask, all layers are equal.
        num_layers = 1 if routing is Routing.TOPK else len(self.mask.row_of_id)
        places = routing.num_places(cluster)
        masks = [mask_of_layer(routing, self.mask, layer, self.frequency, places) for layer in range(num_layers)]
        # Dispatch is planned only if the destination of every token is known in every layer.
        if all(mask.rank_of_rows(cluster.ep_size) is not None for mask in masks):
            dispatches = [DispatchKind.PLANNED if way is DispatchKind.ONE_COPY else way for way in dispatches]
        # Route the tokens once for each layer. The random stream depends on the case, not on what else is simulated.
        costs = []
        for layer, mask in enumerate(masks):
            key = (topk, cluster.num_gpus, cluster.ep_size, list(Routing).index(routing), layer)
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
            rows = self.route(cluster, mask, topk, rng)
            load = expected_expert_load(mask, self.frequency.occurrences, topk).reshape(cluster.ep_size, -1).sum(axis=1)
            expected = {"expected_load_max_over_mean": float(load.max() / load.mean())}
            costs.append([self._figures(dispatch, *rows, cluster) | expected for dispatch in dispatches])
        return [
            _cost(cluster, topk, routing, dispatch, **_mean(of_layers))
            for dispatch, *of_layers in zip(dispatches, *costs, strict=True)
        ]

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

    def _figures(
        self, dispatch: DispatchKind, per_expert: np.ndarray, per_rank: np.ndarray, cluster: Cluster
    ) -> dict[str, float]:
        """Return the figures of one way to dispatch in one layer, by the names of `DispatchCost`."""
        rows = per_expert if dispatch is DispatchKind.STOCK else per_rank
        collectives = exchanges(dispatch, rows, self.workload, cluster)
        # Calls of the opposite direction swap sent and received rows, which have the same mean over ranks.
        sent_bytes = np.zeros(len(Reach))
        for exchange in collectives:
            sent_of_ranks = cluster.sent_by_reach(exchange.rows)  # [ranks, reaches]
            sent_bytes += exchange.calls * exchange.bytes_per_row * sent_of_ranks.mean(axis=0)
        seconds = [cluster.seconds(exchange.rows, exchange.bytes_per_row) for exchange in collectives]
        load = cluster.reverse(per_expert).sum(axis=1)
        return {
            "bytes_own": sent_bytes[Reach.OWN],
            "bytes_node": sent_bytes[Reach.NODE],
            "bytes_across": sent_bytes[Reach.ACROSS],
            "rows": rows.sum() / cluster.num_gpus,
            "load_max_over_mean": load.max() / load.mean(),
            "all_to_all_seconds": seconds[0],
            "seconds": sum(exchange.calls * time for exchange, time in zip(collectives, seconds, strict=True)),
        }


def _cost(cluster: Cluster, topk: int, routing: Routing, dispatch: DispatchKind, **result: Any) -> DispatchCost:
    """Return the cost of a case, whose figures or whose reason to be impossible `result` has."""
    return DispatchCost(cluster.num_gpus, cluster.ep_size, topk, f"{routing.value}, {_NAMES[dispatch]}", **result)


def _mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the layers."""
    return {name: float(np.mean([of_layer[name] for of_layer in figures])) for name in figures[0]}
