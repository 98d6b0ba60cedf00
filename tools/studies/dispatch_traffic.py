"""The ranks of a cluster, the rows that they send each other, and the collectives of dispatch."""

from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask, unpack_bits

NO_EXPERT = -1
_WEIGHT_BYTES = 4  # routers compute in fp32
_COUNT_BYTES = _INDEX_BYTES = 8


class Sending(Enum):
    """A way to send tokens to their experts; the values are names in tables and plots."""

    STOCK = "row per expert"
    ONE_COPY = "one copy"
    PLANNED = "planned"
    NODE_COPY = "one copy per node"
    """DeepEP: one copy to each node, to the GPU with the sender's number on the node, which copies it to its peers."""


class Reach(IntEnum):
    """How far a row travels; arrays by reach have one column for each value."""

    OWN = 0
    """The row stays on its rank: a copy in memory that uses no link."""
    NODE = 1
    """The row goes to another GPU of the same node."""
    ACROSS = 2
    """The row goes to another node."""


class Link(NamedTuple):
    """A kind of network link between GPUs.

    Attributes:
        bandwidth: Bytes per second of each GPU, in both directions at once.
        latency: Constant part of the time of a message, in seconds.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Expert-parallel groups of contiguous ranks, one rank on each GPU, as in Megatron.

    An array of rows has the shape [ranks, ranks of a group]: what each rank sends to each rank of its own group.

    Attributes:
        num_gpus: Number of ranks.
        ep_size: Number of ranks in each expert-parallel group.
        gpus_per_node: Number of ranks on each node.
        node_link: Link to the GPUs of the same node.
        network_link: Link to the GPUs of other nodes.

    Raises:
        UserError: The GPUs are not a whole number of nodes, or a group has fewer than two ranks.
    """

    num_gpus: int
    ep_size: int
    gpus_per_node: int
    node_link: Link
    network_link: Link

    def __post_init__(self) -> None:
        if self.num_gpus % self.gpus_per_node:
            raise UserError(
                f"{self.num_gpus} GPUs are not a whole number of nodes of {self.gpus_per_node}; "
                f"give a multiple of {self.gpus_per_node}"
            )
        if self.ep_size < 2:
            raise UserError(f"expert parallelism needs at least 2 ranks, not {self.ep_size}: nothing would be sent")

    @property
    def nodes_per_group(self) -> int | None:
        """Number of nodes that a group fills evenly, 1 if the group is part of a node, else None."""
        if self.gpus_per_node % self.ep_size == 0:
            return 1
        return self.ep_size // self.gpus_per_node if self.ep_size % self.gpus_per_node == 0 else None

    @cached_property
    def reach(self) -> np.ndarray:
        """The `Reach` from each rank to each rank of its group, int64 [ranks, ranks of a group]."""
        ranks = np.arange(self.num_gpus)[:, None]
        peers = ranks // self.ep_size * self.ep_size + np.arange(self.ep_size)
        on_node = ranks // self.gpus_per_node == peers // self.gpus_per_node
        return np.where(ranks == peers, Reach.OWN, np.where(on_node, Reach.NODE, Reach.ACROSS))

    def sent_by_reach(self, rows: np.ndarray) -> np.ndarray:
        """Return how many of the rows [ranks, ranks of a group] each rank sends by reach, int64 [ranks, reaches]."""
        return np.stack([np.where(self.reach == reach, rows, 0).sum(axis=1) for reach in Reach], axis=1)

    def reverse(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of the opposite direction: what each rank receives from each rank of its group."""
        groups = rows.reshape(-1, self.ep_size, self.ep_size)
        return groups.swapaxes(1, 2).reshape(rows.shape)

    def through_nodes(self, per_rank: np.ndarray, per_node: np.ndarray) -> np.ndarray:
        """Return the rows that each rank sends to each rank, if a token crosses once to each node: see `NODE_COPY`.

        Args:
            per_rank: Tokens of each rank that need each rank, integer [ranks, ranks of a group].
            per_node: Tokens of each rank that need each node of its group, integer [ranks, nodes of a group].
        """
        num_nodes = per_node.shape[1]
        node, gpu = np.arange(num_nodes), np.arange(self.ep_size // num_nodes)
        # [groups, node, GPU, node, GPU] and [groups, node, GPU, node]: of the sender, then of the receiver.
        needed = per_rank.reshape(-1, num_nodes, len(gpu), num_nodes, len(gpu))
        across = per_node.reshape(-1, num_nodes, len(gpu), num_nodes) * (node[:, None, None] != node)
        sent = np.zeros_like(needed)
        # The GPU with a number sends to its node's peers what the GPUs with this number on all nodes have for them.
        sent[:, node, :, node, :] = needed.sum(axis=1).transpose(2, 0, 1, 3)
        sent[:, :, gpu, :, gpu] += across.transpose(2, 0, 1, 3)
        return sent.reshape(per_rank.shape)

    def seconds(self, rows: np.ndarray, bytes_per_row: int) -> float:
        """Return the time of an all-to-all in seconds, from the common start to the end on the slowest rank.

        A message of n bytes takes `α + n/β` (R. Hockney, "The communication challenge for MPP", Parallel Computing 20,
        1994), with latency α and bandwidth β. An all-to-all sends one message to every peer, even if it is empty: the
        pairwise exchange of R. Thakur, R. Rabenseifner and W. Gropp ("Optimization of collective communication
        operations in MPICH", IJHPCA 19, 2005), which takes `(p - 1) α + n/β` on p ranks. NCCL also sends directly to
        each peer.

        Links carry both directions at once, so the larger one of the sent and received bytes of a rank counts. Both
        kinds of links work at the same time, and the slower one determines the time. Rows that stay on their rank take
        no time. The model ignores contention in the network beyond the GPUs' own links, and other traffic.

        Args:
            rows: Rows from each rank to each rank of its group, integer [ranks, ranks of a group].
            bytes_per_row: Size of a row in bytes.
        """
        num_peers = self.sent_by_reach(np.ones_like(rows))
        num_rows = np.maximum(self.sent_by_reach(rows), self.sent_by_reach(self.reverse(rows)))  # [ranks, reaches]
        return max(
            float((num_peers[:, reach] * link.latency + num_rows[:, reach] * bytes_per_row / link.bandwidth).max())
            for reach, link in ((Reach.NODE, self.node_link), (Reach.ACROSS, self.network_link))
        )


class VisibleLists:
    """The visible sets of a mask's first layer as lists of experts, from which experts can be drawn.

    Args:
        mask: The routing mask.
    """

    def __init__(self, mask: RoutingMask) -> None:
        self._row_of_id, visible_bits = mask.table_of_layer(0)
        visible = unpack_bits(visible_bits, mask.num_experts)
        # The experts of all sets, one set after the other; the number of experts of each set, and its first position.
        self._experts = np.nonzero(visible)[1].astype(np.int32)
        self._sizes = visible.sum(axis=1, dtype=np.int32)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def draw(self, token_ids: np.ndarray, topk: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `min(k, V)` visible experts for each token; all subsets of this size are equally likely.

        A router takes the visible experts of the highest scores (`maskmoe.transformer.selection.select_experts`). A
        simulation has no scores, so random draws replace them: Floyd's algorithm (Bentley and Floyd, "A sample of
        brilliance", CACM 1987), run on all tokens at once.

        Args:
            token_ids: Ids of the tokens, integer [tokens].
            topk: K, the largest number of experts of a token.
            rng: Source of randomness.

        Returns:
            integer [k, tokens], different experts of each token; `NO_EXPERT` where a token sees fewer than k experts.
        """
        rows = self._row_of_id[token_ids]
        sizes = self._sizes[rows]
        places = np.empty((topk, len(token_ids)), np.int32)  # positions in the visible sets
        for number in range(topk):
            last = sizes - topk + number  # negative if the set has no further expert
            drawn = (rng.random(len(last)) * (last + 1)).astype(np.int32)
            is_taken = (places[:number] == drawn).any(axis=0)
            places[number] = np.where(is_taken | (last < 0), last, drawn)
        experts = self._experts[self._starts[rows] + np.maximum(places, 0)]
        return np.where(places < 0, NO_EXPERT, experts)


def rows_to_ranks(experts: np.ndarray, num_ranks: int, experts_per_rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the rows that a rank sends to each rank of its expert-parallel group.

    Args:
        experts: Selected experts of the rank's tokens, integer [k, tokens], see `VisibleLists.draw`.
        num_ranks: Number of ranks of the group.
        experts_per_rank: Number of experts on each rank; each rank holds a contiguous block of experts.

    Returns:
        The rows if a token is sent once for every selected expert, and the rows if a token is sent once to every rank
        that holds selected experts, int64 [ranks] each.
    """
    # Places without an expert count for one additional rank, which is cut off.
    ranks = np.sort(np.where(experts == NO_EXPERT, num_ranks, experts // experts_per_rank), axis=0)
    is_first = np.ones(ranks.shape, bool)
    is_first[1:] = ranks[1:] != ranks[:-1]
    per_expert, per_rank = (np.bincount(sent, minlength=num_ranks + 1) for sent in (ranks.ravel(), ranks[is_first]))
    return per_expert[:num_ranks], per_rank[:num_ranks]


@dataclass(frozen=True)
class Workload:
    """Sizes of the data that MoE layers move in one micro-batch.

    Attributes:
        tokens_per_rank: Tokens of a micro-batch on each rank.
        hidden_size: Elements of a hidden state.
        bytes_per_element: Bytes of an element of a hidden state or its gradient.
        num_experts: N, the number of experts in a layer.
        num_layers: Number of layers that share the plan of a micro-batch, if dispatch is planned.
    """

    tokens_per_rank: int
    hidden_size: int
    bytes_per_element: int
    num_experts: int
    num_layers: int


class Exchange(NamedTuple):
    """A kind of collective that a layer runs.

    Attributes:
        content: Name of the data that the collective carries.
        calls: Calls in one layer and step, forward and backward; less than 1 if several layers share a call.
        rows: Rows of one call, integer [ranks, ranks of a group]. Half of the calls have the opposite direction.
        bytes_per_row: Size of a row in bytes.
    """

    content: str
    calls: float
    rows: np.ndarray
    bytes_per_row: int


def exchanges(
    sending: Sending, rows: np.ndarray, workload: Workload, cluster: Cluster, topk: int
) -> tuple[Exchange, ...]:
    """Return all collectives of one layer and step, for one micro-batch without recomputation.

    The first exchange carries hidden states. Hidden states are dispatched and combined, and so are their gradients:
    four all-to-alls. Each way to dispatch adds further collectives:

    - Megatron's dispatcher (`MoEAlltoAllTokenDispatcher`) also sends the probability of each row, and its gradient
      back, which makes six all-to-alls. Before these, all ranks gather the number of rows of each rank for each expert.
    - One-copy dispatch also sends, with each row, the weights of the receiving rank's experts, and their gradients
      back, which makes six all-to-alls. Before these, every rank reports to every other rank the number of rows that it
      sends and the experts that the rows are for.
    - Planned dispatch is one-copy dispatch that exchanges these numbers once for all layers.
    - DeepEP sends the k weights and experts of a token with each row, and gradients of the weights back.

    Args:
        sending: The way to send tokens.
        rows: Rows of hidden states that ranks send in the dispatch, integer [ranks, ranks of a group].
        workload: Sizes of the data.
        cluster: The ranks.
        topk: K, the largest number of experts of a token.
    """
    hidden = Exchange("hidden states", 4, rows, workload.hidden_size * workload.bytes_per_element)
    to_every_peer = (cluster.reach != Reach.OWN).astype(np.int64)
    experts_per_rank = workload.num_experts // cluster.ep_size
    weights_per_row, counts = experts_per_rank, 1 + experts_per_rank
    if sending is Sending.STOCK:
        weights_per_row, counts = 1, workload.num_experts
    elif sending is Sending.NODE_COPY:
        weights_per_row = topk
    layers_of_call = workload.num_layers if sending is Sending.PLANNED else 1
    experts = [Exchange("experts", 1, rows, topk * _INDEX_BYTES)] if sending is Sending.NODE_COPY else []
    return (
        hidden,
        Exchange("weights", 2, rows, weights_per_row * _WEIGHT_BYTES),
        Exchange("counts", 1 / layers_of_call, to_every_peer, layers_of_call * counts * _COUNT_BYTES),
        *experts,
    )
