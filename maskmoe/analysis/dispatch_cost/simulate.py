"""Simulate the dispatch of a dataset's tokens on any number of GPUs, with and without a routing mask."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from tqdm import tqdm

from maskmoe.analysis.dispatch_cost.cluster import Cluster, Layout, Reach
from maskmoe.analysis.dispatch_cost.dispatch import Traffic, Workload, exchanges, rows_of_choices
from maskmoe.analysis.dispatch_cost.routing import VisibleTable
from maskmoe.analysis.dispatch_cost.variants import VARIANTS, Masks, Routing, Variant
from maskmoe.errors import UserError
from maskmoe.routing_mask import RoutingMask
from maskmoe.routing_mask.mask import expected_expert_load
from maskmoe.transformer.dispatch.kind import DispatchKind

# A block of this size fits into the cache and is large enough for numpy to be efficient.
_BLOCK_TOKENS = 1 << 17


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Gives every rank consecutive tokens of a dataset, starting at a position of its own.

    The start positions are spread evenly over the dataset. Documents keep their order. If the ranks together need more
    tokens than the dataset has, their parts overlap.

    Attributes:
        tokens: Ids of the whole dataset, integer [dataset tokens].
        tokens_per_rank: Tokens of a micro-batch on each rank, at least 1.

    Raises:
        UserError: The dataset has fewer tokens than one rank needs.
    """

    tokens: np.ndarray
    tokens_per_rank: int

    def __post_init__(self) -> None:
        if len(self.tokens) < self.tokens_per_rank:
            raise UserError(
                f"the dataset has {len(self.tokens):,} tokens, fewer than the {self.tokens_per_rank:,} of one rank; "
                "give fewer tokens to each rank or use a larger dataset"
            )

    def overlap(self, num_ranks: int) -> bool:
        """Return whether some tokens are given to more than one of `num_ranks` ranks."""
        return num_ranks * self.tokens_per_rank > len(self.tokens)

    def of_ranks(self, ranks: range, num_ranks: int) -> np.ndarray:
        """Return the token ids of the given ranks, [ranks, tokens per rank] in the dataset's dtype.

        Args:
            ranks: The wanted ranks.
            num_ranks: Number of all ranks, which determines the start positions.
        """
        starts = np.array(ranks, np.int64) * len(self.tokens) // num_ranks
        positions = (starts[:, None] + np.arange(self.tokens_per_rank)) % len(self.tokens)
        return np.asarray(self.tokens)[positions]


@dataclass(frozen=True)
class Cost:
    """Cost of dispatch in one layer and one step of one micro-batch, forward and backward, without recomputation.

    Attributes:
        bytes_own: Bytes that a rank puts into all collectives for itself; mean over ranks.
        bytes_node: Bytes that a rank puts into all collectives for other GPUs of its node; mean over ranks.
        bytes_across: Bytes that a rank puts into all collectives for other nodes; mean over ranks.
        rows: Hidden states that a rank receives in one all-to-all, including those from itself; mean over ranks.
        max_rows: Maximum of `rows` over ranks.
        load: Tokens times selected experts that a rank computes; mean over ranks.
        max_load: Maximum of `load` over ranks.
        expected_imbalance: Maximum over mean of the load that is expected from the frequencies of the dataset's ids.
        all_to_all_seconds: Time of one all-to-all of hidden states.
        seconds: Time of all collectives.
    """

    bytes_own: float
    bytes_node: float
    bytes_across: float
    rows: float
    max_rows: float
    load: float
    max_load: float
    expected_imbalance: float
    all_to_all_seconds: float
    seconds: float

    @property
    def imbalance(self) -> float:
        """Maximum over mean of the load of the ranks."""
        return self.max_load / self.load

    @classmethod
    def mean(cls, costs: Sequence["Cost"]) -> "Cost":
        """Return the mean of each field over the costs of several layers."""
        return cls(*np.mean([astuple(cost) for cost in costs], axis=0).tolist())


@dataclass(frozen=True)
class Result:
    """Result of one variant on one layout.

    Attributes:
        layout: The ranks.
        topk: k, the number of experts of a token.
        variant: The way to train.
        dispatch: The way to dispatch, which is planned if the mask allows it.
        cost: Mean cost over the simulated layers; None if the variant is impossible.
        impossible: Reason why the variant is impossible; None if it is possible.
    """

    layout: Layout
    topk: int
    variant: Variant
    dispatch: DispatchKind
    cost: Cost | None = None
    impossible: str | None = None


@dataclass(frozen=True, eq=False)
class Simulation:
    """Routes tokens, counts the rows that ranks would send each other, and computes the time of the exchanges.

    Attributes:
        masks: The routing masks to compare. Costs are the mean over their layers.
        micro_batches: Token ids for each rank, of the dataset whose counts the masks have.
        cluster: The links.
        workload: Values of k, and sizes.
        seed: Seed of the choices of experts, not negative.
    """

    masks: Masks
    micro_batches: MicroBatches
    cluster: Cluster
    workload: Workload
    seed: int = 0

    def run(self, layouts: Sequence[Layout], progress: bool = False) -> list[Result]:
        """Simulate all variants for each k and each layout, in this order.

        Args:
            layouts: The layouts of the ranks.
            progress: Whether to show a progress bar on stderr if the work takes more than half a second.
        """
        cases = list(product(self.workload.topks, layouts, Routing))
        num_tokens = sum(
            layout.num_gpus * self.micro_batches.tokens_per_rank * self.masks.num_layers(routing)
            for topk, layout, routing in cases
            if self.masks.why_impossible(routing, layout, topk) is None
        )
        with tqdm(
            total=num_tokens, unit="token", unit_scale=True, desc="dispatching", delay=0.5, disable=not progress
        ) as bar:
            return [result for case in cases for result in self._simulate(*case, bar)]

    def _simulate(self, topk: int, layout: Layout, routing: Routing, bar: tqdm) -> list[Result]:
        """Return the results of all variants with one kind of routing."""
        variants = [variant for variant in VARIANTS if variant.routing is routing]
        if reason := self.masks.why_impossible(routing, layout, topk):
            return [Result(layout, topk, variant, variant.dispatch, impossible=reason) for variant in variants]
        masks = self.masks.layers_of(routing, layout)
        # Dispatch is planned only if the destination of every token is known in every layer.
        is_planned = all(mask.rank_of_rows(layout.ep_size) is not None for mask in masks)
        one_copy = DispatchKind.PLANNED if is_planned else DispatchKind.ONE_COPY
        dispatches = [
            one_copy if variant.dispatch is DispatchKind.ONE_COPY else variant.dispatch for variant in variants
        ]
        # Route the tokens once for each layer. The random stream depends on the case, not on what else is simulated.
        costs = []
        for number, mask in enumerate(masks):
            key = (topk, layout.num_gpus, layout.ep_size, list(Routing).index(routing), number)
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
            traffics = self._route(layout, mask, topk, rng, bar)
            expert_load = expected_expert_load(mask, self.masks.frequency.occurrences, topk)
            load = expert_load.reshape(layout.ep_size, -1).sum(axis=1)
            costs.append([self._cost(dispatch, *traffics, load.max() / load.mean()) for dispatch in dispatches])
        return [
            Result(layout, topk, variant, dispatch, Cost.mean(costs_of_layers))
            for variant, dispatch, *costs_of_layers in zip(variants, dispatches, *costs, strict=True)
        ]

    def _route(
        self, layout: Layout, mask: RoutingMask, topk: int, rng: np.random.Generator, bar: tqdm
    ) -> tuple[Traffic, Traffic]:
        """Select experts for all tokens under a mask of one layer.

        Returns:
            The traffic of one all-to-all if a token is sent once for every selected expert, and the traffic if a token
            is sent once to every rank that holds selected experts.
        """
        table = VisibleTable.of_layer(mask, 0)
        traffics = Traffic.empty(layout), Traffic.empty(layout)
        for sources in _blocks(layout, self.micro_batches.tokens_per_rank):
            token_ids = self.micro_batches.of_ranks(sources, layout.num_gpus)  # [sources, tokens]
            choices = table.choose(token_ids.ravel(), topk, rng)
            counts = rows_of_choices(choices, token_ids.shape, layout.ep_size, table.num_experts // layout.ep_size)
            for traffic, rows in zip(traffics, counts, strict=True):
                traffic.add(sources, rows)
            bar.update(token_ids.size)
        return traffics

    def _cost(self, dispatch: DispatchKind, per_expert: Traffic, per_rank: Traffic, expected_imbalance: float) -> Cost:
        """Return the cost of one way to dispatch in one layer."""
        traffic = per_expert if dispatch is DispatchKind.STOCK else per_rank
        sent_bytes, seconds = np.zeros(len(Reach)), 0.0
        collectives = exchanges(dispatch, traffic, self.workload)
        for exchange in collectives:
            # Calls of the opposite direction swap sent and received rows, which have the same mean over ranks.
            sent_bytes += exchange.calls * exchange.bytes_per_row * exchange.traffic.sent.mean(axis=0)
            seconds += exchange.calls * exchange.seconds(self.cluster)
        rows, load = (counted.received.sum(axis=1) for counted in (traffic, per_expert))  # [ranks]
        return Cost(
            *sent_bytes.tolist(),
            rows=float(rows.mean()),
            max_rows=float(rows.max()),
            load=float(load.mean()),
            max_load=float(load.max()),
            expected_imbalance=float(expected_imbalance),
            all_to_all_seconds=collectives[0].seconds(self.cluster),
            seconds=seconds,
        )


def _blocks(layout: Layout, tokens_per_rank: int) -> Iterator[range]:
    """Yield all ranks in blocks; a block holds ranks of one group and about `_BLOCK_TOKENS` tokens."""
    step = max(1, _BLOCK_TOKENS // tokens_per_rank)
    for first in range(0, layout.num_gpus, layout.ep_size):
        for start in range(first, first + layout.ep_size, step):
            yield range(start, min(start + step, first + layout.ep_size))
