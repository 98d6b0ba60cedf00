"""Computes how many experts tokens use under a routing mask."""

from dataclasses import dataclass

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask


@dataclass(frozen=True)
class ExpertUse:
    """The number of experts that tokens use, min(k, V) for a token with V visible experts.

    Attributes:
        most: the largest number, k.
        mean: the mean over the tokens of the counted datasets.
        description: how the mean comes about, for people; empty without a routing mask.
    """

    most: int
    mean: float
    description: str = ""

    @classmethod
    def from_mask(cls, mask: RoutingMask | None, topk: int) -> "ExpertUse":
        """Return the use of experts under a routing mask; without one, every token uses `topk` experts.

        The mean assumes that the frequent ids have exactly the share of occurrences that they were chosen to cover. The
        true share differs by less than the share of one id.
        """
        if mask is None:
            return cls(topk, topk)
        used = np.minimum(mask.num_visible, topk)
        is_frequent = mask.num_visible > 1
        if is_frequent.all() or not is_frequent.any():
            return cls(topk, float(used.mean()), f"every id uses {used.mean():.3g}")
        share, of_frequent = mask.provenance.frequent_mass, float(used[is_frequent].mean())
        mean = share * of_frequent + (1 - share) * float(used[~is_frequent].mean())
        return cls(topk, mean, f"{share:.0%} of the tokens use {of_frequent:.3g}, the others 1")
