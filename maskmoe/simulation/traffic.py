"""Count the rows that ranks send each other."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from maskmoe.simulation.layout import Layout, Reach
from maskmoe.simulation.routing import Choice


@dataclass(frozen=True)
class RowsBetween:
    """Number of rows from some ranks of an expert-parallel group to each rank of the group.

    Attributes:
        per_expert: Rows if a token is sent once for every selected expert, int64 [sources, ranks].
        per_rank: Rows if a token is sent once to every rank that holds selected experts, int64 [sources, ranks].
    """

    per_expert: np.ndarray
    per_rank: np.ndarray


def rows_of_choices(
    choices: Iterable[Choice], num_sources: int, tokens_per_source: int, num_ranks: int, experts_per_rank: int
) -> RowsBetween:
    """Count the rows that follow from the selected experts of tokens.

    Args:
        choices: Selected experts of the tokens of all sources; token positions count source by source.
        num_sources: Number of ranks that hold the tokens.
        tokens_per_source: Number of tokens on each of these ranks.
        num_ranks: Number of ranks of the group.
        experts_per_rank: Number of experts on each rank; each rank holds a contiguous block of experts.
    """
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
    return RowsBetween(per_expert.reshape(num_sources, -1), per_rank.reshape(num_sources, -1))


def planned_rows(destinations: np.ndarray, num_selected: np.ndarray, num_ranks: int) -> RowsBetween:
    """Count the rows of tokens whose visible experts are all on one rank.

    The counts do not depend on the selected experts.

    Args:
        destinations: Rank that holds the visible experts of each token, integer [sources, tokens].
        num_selected: Number of experts that each token selects, integer [sources, tokens].
        num_ranks: Number of ranks of the group.
    """
    num_sources = len(destinations)
    pairs = (np.arange(num_sources)[:, None] * num_ranks + destinations).ravel()
    per_expert = np.bincount(pairs, weights=num_selected.ravel(), minlength=num_sources * num_ranks)
    per_rank = np.bincount(pairs, minlength=num_sources * num_ranks)
    return RowsBetween(per_expert.astype(np.int64).reshape(num_sources, -1), per_rank.reshape(num_sources, -1))


@dataclass(frozen=True)
class Traffic:
    """Number of rows of one exchange, by rank and reach (see `Reach`).

    Attributes:
        sent: Rows that each rank sends, int64 [ranks, reaches].
        received: Rows that each rank receives, int64 [ranks, reaches].
    """

    sent: np.ndarray
    received: np.ndarray

    @classmethod
    def to_every_peer(cls, layout: Layout) -> "Traffic":
        """Return the traffic of one row from each rank to each other rank of its group."""
        return cls(sent=layout.num_peers, received=layout.num_peers)


class TrafficCounter:
    """Adds up the rows of a few sending ranks at a time, so that memory never holds a matrix of all rank pairs.

    Args:
        layout: The ranks.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sent, self._received = np.zeros((2, layout.num_gpus, len(Reach)), np.int64)

    def add(self, sources: range, rows: np.ndarray) -> None:
        """Add the rows that some ranks of one group send.

        Args:
            sources: The sending ranks.
            rows: Rows from each source to each rank of the group, integer [sources, ranks of the group].
        """
        ep_size, gpus_per_node = self._layout.ep_size, self._layout.gpus_per_node
        first_rank = sources.start // ep_size * ep_size
        senders, receivers = np.array(sources), np.arange(first_rank, first_rank + ep_size)
        own = np.where(senders[:, None] == receivers, rows, 0)
        on_node = np.where(senders[:, None] // gpus_per_node == receivers // gpus_per_node, rows, 0)
        rows_by_reach = {Reach.OWN: own, Reach.NODE: on_node - own, Reach.ACROSS: rows - on_node}
        for reach, rows_of_reach in rows_by_reach.items():
            self._sent[senders, reach] += rows_of_reach.sum(axis=1)
            self._received[receivers, reach] += rows_of_reach.sum(axis=0)

    def total(self) -> Traffic:
        """Return the traffic counted so far."""
        return Traffic(self._sent.copy(), self._received.copy())
