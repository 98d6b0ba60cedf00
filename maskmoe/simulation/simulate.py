"""Dispatch of the tokens of a dataset, on any number of GPUs, with and without a routing mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from maskmoe.routing_mask import RoutingMask, TokenFrequency
from maskmoe.routing_mask.locality import rank_of_rows
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

# Small enough for the cache, large enough for numpy.
_BLOCK_TOKENS = 1 << 17


@dataclass(frozen=True)
class _LayerTraffic:
    """The rows of one all-to-all in one layer, and the load that the ranks of a group can expect, [ranks]."""

    per_expert: Traffic
    per_rank: Traffic
    expected_load: np.ndarray


class Simulation:
    """Routes tokens, counts the rows that ranks would send each other, and says how long that takes.

    Args:
        mask: the given routing mask.
        layers: of it that are simulated, counted from 0; costs are their mean.
        frequency: of the ids in the dataset.
        micro_batches: the ids that each rank gets, of the same dataset.
        cluster: the links.
        workload: values of k, and sizes.
        seed: of the choices of experts, not negative.
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
    ):
        self._masks = Masks(mask, layers, frequency)
        self._occurrences = frequency.occurrences
        self._micro_batches = micro_batches
        self._cluster = cluster
        self._workload = workload
        self._seed = seed

    def run(self, layouts: Sequence[Layout], progress: bool = False) -> list[Result]:
        """Simulate all variants for each k and each layout, in this order.

        Args:
            layouts: the ranks.
            progress: show a progress bar on stderr if it takes more than a moment.
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
        """The variants with one kind of routing."""
        variants = [variant for variant in VARIANTS if variant.routing is routing]
        if reason := self._masks.why_impossible(routing, layout, topk):
            yield from (Result(layout, topk, variant, variant.dispatch, impossible=reason) for variant in variants)
            return
        masks = self._masks.layers_of(routing, layout)
        ranks_of_rows = [rank_of_rows(mask, layout.ep_size) for mask in masks]
        is_planned = all(rank_of_row is not None for rank_of_row in ranks_of_rows)
        traffics = []
        for number, (mask, rank_of_row) in enumerate(zip(masks, ranks_of_rows, strict=True)):
            key = (topk, layout.num_gpus, layout.ep_size, list(Routing).index(routing), number)
            rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
            rank_of_set = rank_of_row[0] if is_planned else None
            traffics.append(self._route(layout, mask, rank_of_set, topk, rng, bar))
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
        """The traffic of one layer; experts are drawn unless the rank of each visible set [sets] is known."""
        table = VisibleTable.of_layer(mask, 0)
        per_expert, per_rank = TrafficCounter(layout), TrafficCounter(layout)
        for sources in _blocks(layout, self._micro_batches.tokens_per_rank):
            token_ids = self._micro_batches.of_ranks(sources, layout.num_gpus)  # [sources, tokens]
            if rank_of_set is None:
                choices = table.choose(token_ids.ravel(), topk, rng)
                experts_per_rank = table.num_experts // layout.ep_size
                rows = rows_of_choices(choices, *token_ids.shape, layout.ep_size, experts_per_rank)
            else:
                destinations = rank_of_set[table.row_of_id[token_ids]]
                rows = planned_rows(destinations, table.num_selected(token_ids, topk), layout.ep_size)
            per_expert.add(sources, rows.per_expert)
            per_rank.add(sources, rows.per_rank)
            bar.update(token_ids.size)
        of_expert = expected_expert_load(mask, self._occurrences, topk)[0]
        expected_load = of_expert.reshape(layout.ep_size, -1).sum(axis=1)
        return _LayerTraffic(per_expert.total(), per_rank.total(), expected_load)

    def _cost(self, layout: Layout, dispatch: DispatchKind, of_layer: _LayerTraffic) -> Cost:
        traffic = of_layer.per_expert if dispatch is DispatchKind.STOCK else of_layer.per_rank
        hidden, *others = exchanges(dispatch, traffic, layout, self._workload)
        sent_bytes, seconds = np.zeros(len(Reach)), 0.0
        for exchange in (hidden, *others):
            # What goes there comes back: the mean over ranks is the same for both.
            sent_bytes += exchange.calls * exchange.bytes_per_row * exchange.traffic.sent.mean(axis=0)
            seconds += exchange.calls * self._cluster.seconds(layout, exchange.traffic, exchange.bytes_per_row)
        rows, load = (counted.received.sum(axis=1) for counted in (traffic, of_layer.per_expert))  # [ranks]
        return Cost(
            *sent_bytes.tolist(),
            rows=float(rows.mean()),
            max_rows=float(rows.max()),
            load=float(load.mean()),
            max_load=float(load.max()),
            expected_imbalance=float(of_layer.expected_load.max() / of_layer.expected_load.mean()),
            all_to_all_seconds=self._cluster.seconds(layout, hidden.traffic, hidden.bytes_per_row),
            seconds=seconds,
        )


def _blocks(layout: Layout, tokens_per_rank: int) -> Iterator[range]:
    """All ranks, some of a group at a time."""
    step = max(1, _BLOCK_TOKENS // tokens_per_rank)
    for first in range(0, layout.num_gpus, layout.ep_size):
        for start in range(first, first + layout.ep_size, step):
            yield range(start, min(start + step, first + layout.ep_size))
