"""Make routing masks before training from the frequency of each token id.

This package imports neither torch nor Megatron.
"""

from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency
from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask, build_routing_mask

__all__ = [
    "MaskProvenance",
    "MaskRecipe",
    "RoutingMask",
    "TokenFrequency",
    "build_routing_mask",
    "count_token_frequency",
]
