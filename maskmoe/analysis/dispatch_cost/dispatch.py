"""Count the rows that ranks send each other, list the collectives of each way to dispatch, and model their time."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from maskmoe.analysis.dispatch_cost.cluster import Cluster, Layout, Reach
from maskmoe.analysis.dispatch_cost.routing import Choice
from maskmoe.errors import UserError
from maskmoe.transformer.dispatch.kind import DispatchKind

_WEIGHT_BYTES = 4  # routers compute in fp32
_COUNT_BYTES = 8
_ID_BYTES = 4


@dataclass(frozen=True)
class Workload:
    """Sizes of the data that MoE layers move in one micro-batch.

    Attributes:
        topks: Different values of k to compare.
        tokens_per_rank: Tokens of a micro-batch on each rank.
        hidden_size: Elements of a hidden state.
        bytes_per_element: Bytes of an element of a hidden state or its gradient.
        num_experts: N, the number of experts in a layer.
        num_layers: Number of layers that share the plan of a micro-batch, if dispatch is planned.

    Raises:
        UserError: A size is not positive, or a k is not between 1 and the number of experts.
    """

    topks: tuple[int, ...]
    tokens_per_rank: int
    hidden_size: int
    bytes_per_element: int
    num_experts: int
    num_layers: int

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "hidden_size", "bytes_per_element"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        for topk in self.topks:
            if not 1 <= topk <= self.num_experts:
                raise UserError(f"top-k must be 1 to {self.num_experts}, the number of experts, not {topk}")


@dataclass(frozen=True, eq=False)
class Traffic:
    """Number of rows of one exchange, by rank and reach (see `Reach`).

    Attributes:
        layout: The ranks.
        sent: Rows that each rank sends, int64 [ranks, reaches].
        received: Rows that each rank receives, int64 [ranks, reaches].
    """

    layout: Layout
    sent: np.ndarray
    received: np.ndarray

    @classmethod
    def empty(cls, layout: Layout) -> "Traffic":
        """Return traffic without rows, to which `add` adds."""
        return cls(layout, *np.zeros((2, layout.num_gpus, len(Reach)), np.int64))

    def add(self, sources: range, rows: np.ndarray) -> None:
        """Add the rows that some ranks of one group send, so that memory never holds a matrix of all rank pairs.

        Args:
            sources: The sending ranks.
            rows: Rows from each source to each rank of the group, integer [sources, ranks of the group].
        """
        ep_size, gpus_per_node = self.layout.ep_size, self.layout.gpus_per_node
        first_rank = sources.start // ep_size * ep_size
        senders, receivers = np.array(sources), np.arange(first_rank, first_rank + ep_size)
        own = np.where(senders[:, None] == receivers, rows, 0)
        on_node = np.where(senders[:, None] // gpus_per_node == receivers // gpus_per_node, rows, 0)
        for reach, rows_of_reach in zip(Reach, (own, on_node - own, rows - on_node), strict=True):
            self.sent[senders, reach] += rows_of_reach.sum(axis=1)
            self.received[receivers, reach] += rows_of_reach.sum(axis=0)


@dataclass(frozen=True)
class Exchange:
    """A kind of collective that a layer runs.

    Attributes:
        content: Name of the data that the collective carries.
        calls: Calls in one layer and step, forward and backward; less than 1 if several layers share a call.
        traffic: Rows of one call. In calls of the opposite direction, sent and received rows are swapped.
        bytes_per_row: Size of a row in bytes.
    """

    content: str
    calls: float
    traffic: Traffic
    bytes_per_row: int

    def seconds(self, cluster: Cluster) -> float:
        """Return the time of a call in seconds, from the common start to the end on the slowest rank.

        A message of n bytes takes `α + n/β` (R. Hockney, "The communication challenge for MPP", Parallel Computing 20,
        1994), with latency α and bandwidth β. An all-to-all sends one message to every peer, even if it is empty: the
        pairwise exchange of R. Thakur, R. Rabenseifner and W. Gropp ("Optimization of collective communication
        operations in MPICH", IJHPCA 19, 2005), which takes `(p - 1) α + n/β` on p ranks. NCCL also sends directly to
        each peer.

        Links carry both directions at once, so the larger one of the sent and received bytes of a rank counts. Both
        kinds of links work at the same time, and the slower one determines the time. Rows that stay on their rank take
        no time. The model ignores contention in the network beyond the GPUs' own links, and other traffic.
        """
        num_peers = self.traffic.layout.num_peers
        num_bytes = np.maximum(self.traffic.sent, self.traffic.received) * self.bytes_per_row  # [ranks, reaches]
        return max(
            float((num_peers[:, reach] * link.latency + num_bytes[:, reach] / link.bandwidth).max())
            for reach, link in ((Reach.NODE, cluster.within), (Reach.ACROSS, cluster.across))
        )


def exchanges(dispatch: DispatchKind, traffic: Traffic, workload: Workload) -> tuple[Exchange, ...]:
    """Return all collectives of one layer and step, for one micro-batch without recomputation.

    The first exchange carries hidden states. Hidden states are dispatched and combined, and so are their gradients:
    four all-to-alls. Each way to dispatch adds further collectives:

    - Megatron's dispatcher (`MoEAlltoAllTokenDispatcher`) also sends the probability of each row, and its gradient
      back, which makes six all-to-alls. Before these, all ranks gather the number of rows of each rank for each expert.
    - One-copy dispatch also sends, with each row, the weights of the receiving rank's experts, and their gradients
      back, which makes six all-to-alls. Before these, every rank reports to every other rank the number of rows that it
      sends and the experts that the rows are for.
    - Planned dispatch gathers the token ids of all ranks, once for all layers.

    Args:
        dispatch: The way to dispatch.
        traffic: Rows of hidden states that ranks send in the dispatch.
        workload: Sizes of the data.
    """
    hidden = Exchange("hidden states", 4, traffic, workload.hidden_size * workload.bytes_per_element)
    num_peers = traffic.layout.num_peers  # one row for each
    to_every_peer = Traffic(traffic.layout, sent=num_peers, received=num_peers)
    if dispatch is DispatchKind.PLANNED:
        ids = workload.tokens_per_rank * _ID_BYTES
        return hidden, Exchange("token ids", 1 / workload.num_layers, to_every_peer, ids)
    if dispatch is DispatchKind.STOCK:
        weights_per_row, counts = 1, workload.num_experts
    else:
        weights_per_row = workload.num_experts // traffic.layout.ep_size
        counts = 1 + weights_per_row
    return (
        hidden,
        Exchange("weights", 2, traffic, weights_per_row * _WEIGHT_BYTES),
        Exchange("counts", 1, to_every_peer, counts * _COUNT_BYTES),
    )


def rows_of_choices(
    choices: Iterable[Choice], shape: tuple[int, ...], num_ranks: int, experts_per_rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the rows from some ranks of an expert-parallel group to each rank of the group.

    Args:
        choices: Selected experts of the tokens of all sources; token positions count source by source.
        shape: Number of ranks that hold the tokens, and number of tokens on each of these ranks.
        num_ranks: Number of ranks of the group.
        experts_per_rank: Number of experts on each rank; each rank holds a contiguous block of experts.

    Returns:
        The rows if a token is sent once for every selected expert, and the rows if a token is sent once to every rank
        that holds selected experts, int64 [sources, ranks] each.
    """
    num_sources, tokens_per_source = shape
    per_expert, per_rank = np.zeros((2, num_sources * num_ranks), np.int64)
    for choice in choices:
        ranks = choice.experts // experts_per_rank  # [selected, tokens]
        pairs = choice.tokens // tokens_per_source * num_ranks + ranks
        # Mark each expert that is the token's first expert on its rank: one row for each rank.
        is_first = np.ones(ranks.shape, bool)
        for position in range(1, len(ranks)):
            is_first[position] = (ranks[:position] != ranks[position]).all(axis=0)
        per_expert += np.bincount(pairs.ravel(), minlength=len(per_expert))
        per_rank += np.bincount(pairs[is_first], minlength=len(per_rank))
    return per_expert.reshape(num_sources, -1), per_rank.reshape(num_sources, -1)
