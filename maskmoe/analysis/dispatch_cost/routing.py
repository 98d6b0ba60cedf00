"""Draw the experts that tokens select, in numpy.

The rule mirrors the router of `maskmoe.transformer.router`: a token selects `min(k, V)` of the V experts that its id
sees. The router takes the experts of the highest scores. A simulation has no scores, so random draws replace them. The
rule is repeated here because the simulation runs without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


class Choice(NamedTuple):
    """The selected experts of tokens that all select the same number of experts.

    Attributes:
        tokens: Positions of the tokens, int64 [tokens].
        experts: Selected experts, integer [selected, tokens]; the experts of a token all differ.
    """

    tokens: np.ndarray
    experts: np.ndarray


@dataclass(frozen=True, eq=False)
class VisibleTable:
    """The visible sets of one layer, as lists of experts.

    Attributes:
        row_of_id: Index of each id's visible set, integer [vocab].
        experts: Experts of all sets, one set after the other, ascending in each set, integer [experts of all sets].
        num_visible: Number of experts in each set, int64 [sets].
        num_experts: N, the number of experts in the layer.
    """

    row_of_id: np.ndarray
    experts: np.ndarray
    num_visible: np.ndarray
    num_experts: int

    @classmethod
    def of_layer(cls, mask: RoutingMask, layer: int) -> "VisibleTable":
        """Return the table of a layer of a mask; layers count from 0."""
        row_of_id, visible_bits = mask.table_of_layer(layer)
        visible = unpack_bits(visible_bits, mask.num_experts)
        experts = np.nonzero(visible)[1].astype(np.int16 if mask.num_experts <= 1 << 15 else np.int32)
        return cls(row_of_id, experts, visible.sum(axis=1), mask.num_experts)

    def choose(self, token_ids: np.ndarray, topk: int, rng: np.random.Generator) -> Iterator[Choice]:
        """Select `min(k, V)` visible experts for each token; all subsets of this size are equally likely.

        This models a router with perfectly balanced scores that depend on the token id only. A trained router depends
        on hidden states, which a simulation does not have.

        Args:
            token_ids: Ids of the tokens, integer [tokens].
            topk: k, the largest number of experts of a token.
            rng: Source of randomness.

        Yields:
            The choices of all tokens whose visible sets have the same size, for each size.
        """
        rows = self.row_of_id[token_ids]
        num_visible = self.num_visible[rows]
        first_of_set = np.cumsum(self.num_visible) - self.num_visible  # positions in `experts`
        for size in np.flatnonzero(np.bincount(num_visible)).tolist():
            tokens = np.flatnonzero(num_visible == size)
            if size <= topk:
                positions = np.broadcast_to(np.arange(size)[:, None], (size, len(tokens)))
            else:
                positions = draw_subsets(rng, len(tokens), topk, size)
            yield Choice(tokens, self.experts[first_of_set[rows[tokens]] + positions])


def draw_subsets(rng: np.random.Generator, count: int, size: int, num_items: int) -> np.ndarray:
    """Draw `count` sets of `size` items, every set equally likely; integer [size, count], each set a column.

    This is Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987), run on all sets at once. It
    takes `size` draws for each set, whatever the number of items.
    """
    chosen = np.empty((size, count), np.uint16 if num_items <= 1 << 16 else np.uint32)
    for position, last in enumerate(range(num_items - size, num_items)):
        drawn = rng.integers(last, size=count, dtype=chosen.dtype, endpoint=True)
        is_taken = (chosen[:position] == drawn).any(axis=0)
        chosen[position] = np.where(is_taken, last, drawn)
    return chosen
