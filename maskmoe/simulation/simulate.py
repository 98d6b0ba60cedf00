"""Simulate the dispatch of a dataset's tokens on any number of GPUs, with and without a routing mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from maskmoe.routing_mask import RoutingMask, TokenFrequency
from maskmoe.routing_mask.mask import expected_expert_load
from maskmoe.simulation.cluster import Cluster
from maskmoe.simulation.dispatch import Workload, exchanges
from maskmoe.simulation.layout import Layout, Reach
from maskmoe.simulation.micro_batches import MicroBatches
from maskmoe.simulation.results import Cost, Result
from maskmoe.simulation.routing import VisibleTable
from maskmoe.simulation.traffic import Traffic, TrafficCounter, planned_rows, rows_of_choices
from maskmoe.simulation.variants import VARIANTS, Masks, Routing
from maskmoe.transformer.dispatch.kind import DispatchKind

# A block of this size fits into the cache and is large enough for numpy to be efficient.
_BLOCK_TOKENS = 1 << 17


@dataclass(frozen=True)
class _LayerTraffic:
    """Traffic and expected load of one layer.

    Attributes:
        per_expert: Rows of one all-to-all if a token is sent once for every selected expert.
        per_rank: Rows of one all-to-all if a token is sent once to every rank that holds selected experts.
        expected_load: Expected load of each rank of a group, float64 [ranks].
    """

    per_expert: Traffic
    per_rank: Traffic
    expected_load: np.ndarray


class Simulation:
    """Routes tokens, counts the rows that ranks would send each other, and computes the time of the exchanges.

    Args:
        mask: The given routing mask.
        layers: Layers of the mask to simulate, counted from 0. Costs are the mean over these layers.
        frequency: Token counts of the dataset.
        micro_batches: Token ids of the same dataset for each rank.
        cluster: The links.
        workload: Values of k, and sizes.
        seed: Seed of the choices of experts, not negative.
    """

    def __init__(
        self,
        mask: RoutingMask,
        layers: Sequence[int],
        frequency: TokenFrequency,
        micro_batches: MicroBatches,
        cluster: Cluster,
        workload: Workload,
        seed: int = 0,
    ) -> None:
        self._masks = Masks(mask, layers, frequency)
        self._occurrences = frequency.occurrences
        self._micro_batches = micro_batches
        self._cluster = cluster
        self._workload = workload
        self._seed = seed

    def run(self, layouts: Sequence[Layout], progress: bool = False) -> list[Result]:
        """Simulate all variants for each k and each layout, in this order.

        Args:
            layouts: The layouts of the ranks.
            progress: Whether to show a progress bar on stderr if the work takes more than half a second.
        """
        cases = [(topk, layout, routing) for topk in self._workload.topks for layout in layouts for routing in Routing]
        num_tokens = sum(
            layout.num_gpus * self._micro_batches.tokens_per_rank * self._masks.num_layers(routing)
            for topk, layout, routing in cases
            if self._masks.why_impossible(routing, layout, topk) is None
        )
        with tqdm(
            total=num_tokens, unit="token", unit_scale=True, desc="dispatching", delay=0.5, disable=not progress
        ) as bar:
            return [result for case in cases for result in self._simulate(*case, bar)]

    def _simulate(self, topk: int, layout: Layout, routing: Routing, bar: tqdm) -> Iterator[Result]:
        """Yield the results of all variants with one kind of routing."""
        variants = [variant for variant in VARIANTS if variant.routing is routing]
        if reason := self._masks.why_impossible(routing, layout, topk):
            yield from (Result(layout, topk, variant, variant.dispatch, impossible=reason) for variant in variants)
            return
        # Dispatch is planned only if the destination of every token is known in every layer.
        masks = self._masks.layers_of(routing, layout)
        ranks_of_sets = [mask.rank_of_rows(layout.ep_size) for mask in masks]
        is_planned = all(rank_of_set is not None for rank_of_set in ranks_of_sets)
        # Route the tokens once for each layer. The random stream depends on the case, not on what else is simulated.
        traffics = []
        for number, (mask, rank_of_set) in enumerate(zip(masks, ranks_of_sets, strict=True)):
            key = (topk, layout.num_gpus, layout.ep_size, list(Routing).index(routing), number)
            rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
            known_ranks = rank_of_set[0] if is_planned and rank_of_set is not None else None
            traffics.append(self._route(layout, mask, known_ranks, topk, rng, bar))
        # Compute the cost of each variant from the same traffic.
        for variant in variants:
            dispatch = variant.dispatch
            if is_planned and dispatch is DispatchKind.ONE_COPY:
                dispatch = DispatchKind.PLANNED
            cost = Cost.mean([self._cost(layout, dispatch, traffic) for traffic in traffics])
            yield Result(layout, topk, variant, dispatch, cost)

    def _route(
        self,
        layout: Layout,
        mask: RoutingMask,
        rank_of_set: np.ndarray | None,
        topk: int,
        rng: np.random.Generator,
        bar: tqdm,
    ) -> _LayerTraffic:
        """Return the traffic of one layer.

        Args:
            layout: The ranks.
            mask: A mask of one layer.
            rank_of_set: Rank of each visible set, integer [sets], if dispatch is planned. None draws the experts.
            topk: k.
            rng: Source of randomness.
            bar: Progress bar, advanced by the number of tokens.
        """
        table = VisibleTable.of_layer(mask, 0)
        per_expert, per_rank = TrafficCounter(layout), TrafficCounter(layout)
        for sources in _blocks(layout, self._micro_batches.tokens_per_rank):
            token_ids = self._micro_batches.of_ranks(sources, layout.num_gpus)  # [sources, tokens]
            if rank_of_set is None:
                choices = table.choose(token_ids.ravel(), topk, rng)
                num_sources, tokens_per_source = token_ids.shape
                experts_per_rank = table.num_experts // layout.ep_size
                rows = rows_of_choices(choices, num_sources, tokens_per_source, layout.ep_size, experts_per_rank)
            else:
                destinations = rank_of_set[table.row_of_id[token_ids]]
                rows = planned_rows(destinations, table.num_selected(token_ids, topk), layout.ep_size)
            per_expert.add(sources, rows.per_expert)
            per_rank.add(sources, rows.per_rank)
            bar.update(token_ids.size)
        expert_load = expected_expert_load(mask, self._occurrences, topk)[0]
        expected_load = expert_load.reshape(layout.ep_size, -1).sum(axis=1)
        return _LayerTraffic(per_expert.total(), per_rank.total(), expected_load)

    def _cost(self, layout: Layout, dispatch: DispatchKind, layer: _LayerTraffic) -> Cost:
        """Return the cost of one way to dispatch in one layer."""
        traffic = layer.per_expert if dispatch is DispatchKind.STOCK else layer.per_rank
        hidden, *others = exchanges(dispatch, traffic, layout, self._workload)
        sent_bytes, seconds = np.zeros(len(Reach)), 0.0
        for exchange in (hidden, *others):
            # Calls of the opposite direction swap sent and received rows, which have the same mean over ranks.
            sent_bytes += exchange.calls * exchange.bytes_per_row * exchange.traffic.sent.mean(axis=0)
            seconds += exchange.calls * self._cluster.seconds(layout, exchange.traffic, exchange.bytes_per_row)
        rows, load = (counted.received.sum(axis=1) for counted in (traffic, layer.per_expert))  # [ranks]
        return Cost(
            *sent_bytes.tolist(),
            rows=float(rows.mean()),
            max_rows=float(rows.max()),
            load=float(load.mean()),
            max_load=float(load.max()),
            expected_imbalance=float(layer.expected_load.max() / layer.expected_load.mean()),
            all_to_all_seconds=self._cluster.seconds(layout, hidden.traffic, hidden.bytes_per_row),
            seconds=seconds,
        )


def _blocks(layout: Layout, tokens_per_rank: int) -> Iterator[range]:
    """Yield all ranks in blocks; a block holds ranks of one group and about `_BLOCK_TOKENS` tokens."""
    step = max(1, _BLOCK_TOKENS // tokens_per_rank)
    for first in range(0, layout.num_gpus, layout.ep_size):
        for start in range(first, first + layout.ep_size, step):
            yield range(start, min(start + step, first + layout.ep_size))
