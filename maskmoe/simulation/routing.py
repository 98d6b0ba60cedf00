"""Which experts tokens select: as many of those that their ids see as a router with top-k would, drawn at random."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


@dataclass(frozen=True)
class Choice:
    """Tokens that select equally many experts.

    Attributes:
        tokens: their numbers, int64 [tokens].
        experts: the selected ones, integer [selected, tokens]; those of a token all differ.
    """

    tokens: np.ndarray
    experts: np.ndarray


@dataclass(frozen=True, eq=False)
class VisibleTable:
    """The visible sets of one layer, as lists of experts.

    Attributes:
        row_of_id: each id's set, integer [vocab].
        experts: of all sets, one after the other, ascending in each, integer [experts of all sets].
        num_visible: of each set, int64 [sets].
        num_experts: N.
    """

    row_of_id: np.ndarray
    experts: np.ndarray
    num_visible: np.ndarray
    num_experts: int

    @classmethod
    def of_layer(cls, mask: RoutingMask, layer: int) -> "VisibleTable":
        """The table of a mask's layer, counted from 0."""
        row_of_id, visible_bits = mask.table_of_layer(layer)
        visible = unpack_bits(visible_bits, mask.num_experts)
        experts = np.nonzero(visible)[1].astype(np.int16 if mask.num_experts <= 1 << 15 else np.int32)
        return cls(row_of_id, experts, visible.sum(axis=1), mask.num_experts)

    @cached_property
    def _first(self) -> np.ndarray:
        """Where each set begins in `experts`, int64 [sets]."""
        return np.cumsum(self.num_visible) - self.num_visible

    @cached_property
    def _sizes(self) -> list[int]:
        """The different sizes of the ids' sets."""
        return np.unique(self.num_visible[self.row_of_id]).tolist()

    def num_selected(self, token_ids: np.ndarray, topk: int) -> np.ndarray:
        """`min(k, V)` of each token, in the shape of its ids."""
        return np.minimum(self.num_visible, topk)[self.row_of_id[token_ids]]

    def choose(self, token_ids: np.ndarray, topk: int, rng: np.random.Generator) -> Iterator[Choice]:
        """Select `min(k, V)` experts for each token; all sets of so many visible experts are equally likely.

        This is a router that balances its load and knows nothing of a token but its id. A trained one goes by hidden
        states, which a simulation does not have.

        Args:
            token_ids: integer [tokens].
            topk: k.
            rng: what draws.

        Yields:
            tokens by the size of their visible sets.
        """
        rows = self.row_of_id[token_ids]
        num_visible = self.num_visible[rows]
        for size in self._sizes:
            tokens = np.flatnonzero(num_visible == size)
            if size <= topk:
                positions = np.broadcast_to(np.arange(size)[:, None], (size, len(tokens)))
            else:
                positions = draw_subsets(rng, len(tokens), topk, size)
            yield Choice(tokens, self.experts[self._first[rows[tokens]] + positions])


def draw_subsets(rng: np.random.Generator, count: int, size: int, num_items: int) -> np.ndarray:
    """Draw `count` sets of `size` items, every set equally likely; integer [size, count], each set a column.

    Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987) on all sets at once. It takes `size`
    draws a set, however many items there are.
    """
    chosen = np.empty((size, count), np.uint16 if num_items <= 1 << 16 else np.uint32)
    for position, last in enumerate(range(num_items - size, num_items)):
        drawn = rng.integers(last, size=count, dtype=chosen.dtype, endpoint=True)
        is_taken = (chosen[:position] == drawn).any(axis=0)
        chosen[position] = np.where(is_taken, last, drawn)
    return chosen
