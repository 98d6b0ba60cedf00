"""Draws the experts of tokens, counts the rows that ranks send each other, and lists the collectives of dispatch."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskmoe.analysis.cluster import Cluster, Reach
from maskmoe.routing_mask.mask import RoutingMask, unpack_bits
from maskmoe.transformer.dispatch.kind import DispatchKind

NO_EXPERT = -1
_WEIGHT_BYTES = 4  # routers compute in fp32
_COUNT_BYTES = 8
_ID_BYTES = 4


class VisibleLists:
    """The visible sets of a mask's first layer as lists of experts, from which experts can be drawn.

    Args:
        mask: the routing mask.
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
            token_ids: ids of the tokens, integer [tokens].
            topk: k, the largest number of experts of a token.
            rng: source of randomness.

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
        experts: selected experts of the rank's tokens, integer [k, tokens], see `VisibleLists.draw`.
        num_ranks: number of ranks of the group.
        experts_per_rank: number of experts on each rank; each rank holds a contiguous block of experts.

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
        tokens_per_rank: tokens of a micro-batch on each rank.
        hidden_size: elements of a hidden state.
        bytes_per_element: bytes of an element of a hidden state or its gradient.
        num_experts: N, the number of experts in a layer.
        num_layers: number of layers that share the plan of a micro-batch, if dispatch is planned.
    """

    tokens_per_rank: int
    hidden_size: int
    bytes_per_element: int
    num_experts: int
    num_layers: int


class Exchange(NamedTuple):
    """A kind of collective that a layer runs.

    Attributes:
        content: name of the data that the collective carries.
        calls: calls in one layer and step, forward and backward; less than 1 if several layers share a call.
        rows: rows of one call, integer [ranks, ranks of a group]. Half of the calls have the opposite direction.
        bytes_per_row: size of a row in bytes.
    """

    content: str
    calls: float
    rows: np.ndarray
    bytes_per_row: int


def exchanges(dispatch: DispatchKind, rows: np.ndarray, workload: Workload, cluster: Cluster) -> tuple[Exchange, ...]:
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
        dispatch: the way to dispatch.
        rows: rows of hidden states that ranks send in the dispatch, integer [ranks, ranks of a group].
        workload: sizes of the data.
        cluster: the ranks.
    """
    hidden = Exchange("hidden states", 4, rows, workload.hidden_size * workload.bytes_per_element)
    to_every_peer = (cluster.reach != Reach.OWN).astype(np.int64)
    if dispatch is DispatchKind.PLANNED:
        ids = workload.tokens_per_rank * _ID_BYTES
        return hidden, Exchange("token ids", 1 / workload.num_layers, to_every_peer, ids)
    if dispatch is DispatchKind.STOCK:
        weights_per_row, counts = 1, workload.num_experts
    else:
        weights_per_row = workload.num_experts // cluster.ep_size
        counts = 1 + weights_per_row
    return (
        hidden,
        Exchange("weights", 2, rows, weights_per_row * _WEIGHT_BYTES),
        Exchange("counts", 1, to_every_peer, counts * _COUNT_BYTES),
    )
