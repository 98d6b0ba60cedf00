"""Cut micro-batches of real tokens for any number of ranks."""

from dataclasses import dataclass

import numpy as np

from maskmoe.errors import UserError


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
