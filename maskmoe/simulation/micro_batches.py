"""Micro-batches of real tokens for any number of ranks."""

from dataclasses import dataclass

import numpy as np

from maskmoe.errors import UserError


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Gives every rank consecutive tokens of a dataset, from a place of its own.

    The places are spread evenly over the dataset. Documents follow each other as they do there. Where there are fewer
    tokens than all ranks take together, stretches overlap.

    Attributes:
        tokens: ids of the whole dataset, integer [dataset tokens].
        tokens_per_rank: of one micro-batch.

    Raises:
        UserError: not even one rank has enough tokens.
    """

    tokens: np.ndarray
    tokens_per_rank: int

    def __post_init__(self) -> None:
        if self.tokens_per_rank < 1:
            raise UserError(f"a rank has at least 1 token, not {self.tokens_per_rank}")
        if len(self.tokens) < self.tokens_per_rank:
            raise UserError(
                f"the dataset has {len(self.tokens):,} tokens, fewer than the {self.tokens_per_rank:,} of one rank; "
                "take fewer tokens a rank or a larger dataset"
            )

    def overlap(self, num_ranks: int) -> bool:
        """Some tokens are given to more than one of so many ranks."""
        return num_ranks * self.tokens_per_rank > len(self.tokens)

    def of_ranks(self, ranks: range, num_ranks: int) -> np.ndarray:
        """The ids of some of `num_ranks` ranks, [ranks, tokens per rank] in the dataset's dtype."""
        starts = np.array(ranks, np.int64) * len(self.tokens) // num_ranks
        places = (starts[:, None] + np.arange(self.tokens_per_rank)) % len(self.tokens)
        return np.asarray(self.tokens)[places]
