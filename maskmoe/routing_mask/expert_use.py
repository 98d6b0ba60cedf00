"""Computes how many experts tokens use under a routing mask."""

from dataclasses import dataclass

import numpy as np

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask


@dataclass(frozen=True)
class ExpertUse:
    """The number of experts that tokens use, min(k, V) for a token with V visible experts.

    Attributes:
        most: The largest number, k; 0 for a model without experts.
        mean: The mean over the tokens of the counted datasets.
    """

    most: int
    mean: float

    @classmethod
    def from_mask(cls, mask: RoutingMask | None, topk: int, layers: FeedForwardLayers) -> "ExpertUse":
        """Return the use of experts under a routing mask; without one, every token uses `topk` experts.

        The mean assumes that the frequent ids have exactly the share of occurrences that they were chosen to cover. The
        true share differs by less than the share of one id.

        Args:
            mask: The routing mask; None if there is none.
            topk: k.
            layers: The feed-forward layers of the model; layers of the decoder that the mask lacks are left out.
        """
        if mask is None:
            return cls(topk, topk)
        num_tables = len(mask.row_of_id)
        numbers = [number for number, has_experts in enumerate(layers.decoder, start=1) if has_experts]
        tables = sorted({table for number in numbers if (table := layers.table(number, num_tables)) < num_tables})
        if not tables:
            return cls(topk, topk)
        return cls(topk, float(np.mean([_mean_use_in_table(mask, topk, table) for table in tables])))


def _mean_use_in_table(mask: RoutingMask, topk: int, table: int) -> float:
    """Return the mean of min(k, V) over the tokens in one table."""
    num_visible = mask.num_visible_of_layer(table)
    used, is_frequent = np.minimum(num_visible, topk), num_visible > 1
    if is_frequent.all() or not is_frequent.any():
        return float(used.mean())
    share = mask.provenance.frequent_mass
    return share * float(used[is_frequent].mean()) + (1 - share) * float(used[~is_frequent].mean())
