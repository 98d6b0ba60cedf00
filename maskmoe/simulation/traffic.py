"""The rows that ranks send each other."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from maskmoe.simulation.layout import Layout
from maskmoe.simulation.routing import Choice


@dataclass(frozen=True)
class RowsBetween:
    """Rows from some ranks of an expert-parallel group to each rank of it.

    Attributes:
        per_expert: one for every selected expert of a token, int64 [sources, ranks].
        per_rank: one for every rank that has any of them, int64 [sources, ranks].
    """

    per_expert: np.ndarray
    per_rank: np.ndarray


def rows_of_choices(
    choices: Iterable[Choice], num_sources: int, tokens_per_source: int, num_ranks: int, experts_per_rank: int
) -> RowsBetween:
    """The rows that choices of experts ask for.

    Args:
        choices: of the tokens of all sources, which are numbered source by source.
        num_sources: ranks that the tokens are on.
        tokens_per_source: on each of these.
        num_ranks: of the group.
        experts_per_rank: of which every rank has an equal, contiguous share.
    """
    per_expert, per_rank = np.zeros((2, num_sources * num_ranks), np.int64)
    for choice in choices:
        ranks = choice.experts // experts_per_rank  # [selected, tokens]
        pairs = choice.tokens // tokens_per_source * num_ranks + ranks
        is_first = np.ones(ranks.shape, bool)  # of a token's experts on a rank
        for position in range(1, len(ranks)):
            is_first[position] = (ranks[:position] != ranks[position]).all(axis=0)
        per_expert += np.bincount(pairs.ravel(), minlength=len(per_expert))
        per_rank += np.bincount(pairs[is_first], minlength=len(per_rank))
    return RowsBetween(per_expert.reshape(num_sources, -1), per_rank.reshape(num_sources, -1))


def planned_rows(destinations: np.ndarray, num_selected: np.ndarray, num_ranks: int) -> RowsBetween:
    """The rows of tokens whose visible experts are all on one rank, whichever of them they select.

    Args:
        destinations: that rank of each token, integer [sources, tokens].
        num_selected: experts that each token selects, integer [sources, tokens].
        num_ranks: of the group.
    """
    num_sources = len(destinations)
    pairs = (np.arange(num_sources)[:, None] * num_ranks + destinations).ravel()
    per_expert = np.bincount(pairs, weights=num_selected.ravel(), minlength=num_sources * num_ranks)
    per_rank = np.bincount(pairs, minlength=num_sources * num_ranks)
    return RowsBetween(per_expert.astype(np.int64).reshape(num_sources, -1), per_rank.reshape(num_sources, -1))


@dataclass(frozen=True)
class Traffic:
    """The rows of one exchange.

    Attributes:
        sent, received: by each rank and how far they go, int64 [ranks, reaches], see `Reach`.
    """

    sent: np.ndarray
    received: np.ndarray

    @classmethod
    def to_every_peer(cls, layout: Layout) -> "Traffic":
        """One row from each rank to each other rank of its group."""
        return cls(sent=layout.num_peers, received=layout.num_peers)


class TrafficCounter:
    """Adds up rows of some ranks after others, so that there never is a matrix of all by all.

    Args:
        layout: the ranks.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._sent, self._received = np.zeros((2, layout.num_gpus, 3), np.int64)

    def add(self, sources: range, rows: np.ndarray) -> None:
        """Count rows.

        Args:
            sources: ranks of one group that send them.
            rows: integer [sources, ranks of the group].
        """
        ep_size, gpus_per_node = self._layout.ep_size, self._layout.gpus_per_node
        first_rank = sources.start // ep_size * ep_size
        senders, receivers = np.array(sources), np.arange(first_rank, first_rank + ep_size)
        own = np.where(senders[:, None] == receivers, rows, 0)
        near = np.where(senders[:, None] // gpus_per_node == receivers // gpus_per_node, rows, 0)
        by_reach = (own, near - own, rows - near)
        for reach, of_reach in enumerate(by_reach):
            self._sent[senders, reach] += of_reach.sum(axis=1)
            self._received[receivers, reach] += of_reach.sum(axis=0)

    def total(self) -> Traffic:
        """The rows counted so far."""
        return Traffic(self._sent.copy(), self._received.copy())
