"""Compares two routing masks of one model: how many visible sets differ."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask


@dataclass(frozen=True)
class MaskChange:
    """The number of visible sets that differ between two masks; each pair of an id and a layer has a visible set.

    Attributes:
        num_pairs: Number of all pairs.
        num_changed: Number of pairs whose visible sets differ.
        num_grown: Number of pairs whose new set holds the old set and further experts.
    """

    num_pairs: int
    num_changed: int
    num_grown: int

    @classmethod
    def between(cls, old: RoutingMask, new: RoutingMask) -> Self:
        """Compare two masks.

        Raises:
            UserError: The masks have different sizes, so one model cannot use both.
        """
        sizes = {
            "vocabulary size": (old.vocab_size, new.vocab_size),
            "number of experts": (old.num_experts, new.num_experts),
            "number of tables": (len(old.row_of_id), len(new.row_of_id)),
        }
        differences = [
            f"its {name} is {after}, not {before}" for name, (before, after) in sizes.items() if after != before
        ]
        if differences:
            raise UserError(f"a routing mask can only be replaced by one of equal sizes: {'; '.join(differences)}")
        num_changed = num_grown = 0
        for layer in range(old.num_layers):
            table = 0 if old.is_shared else layer
            sets, new_sets = (mask.visible_bits[table, mask.row_of_id[table]] for mask in (old, new))  # [vocab, bytes]
            is_changed = (sets != new_sets).any(axis=1)
            num_changed += int(np.count_nonzero(is_changed))
            num_grown += int(np.count_nonzero(is_changed & ((sets | new_sets) == new_sets).all(axis=1)))
        return cls(old.vocab_size * old.num_layers, num_changed, num_grown)

    def __str__(self) -> str:
        """Describe the change in one line."""
        share = f"{self.num_changed:,} of {self.num_pairs:,} (id, layer) pairs change"
        return f"{share}, {self.num_grown:,} of them only gain visible experts"
