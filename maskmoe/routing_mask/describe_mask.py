"""Describes in one clause how many experts the ids of a routing mask see."""

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask


def describe_visible_experts(mask: RoutingMask) -> str:
    """Say how many experts the ids see, in one clause; hash layers come first if the mask has some."""
    beyond = _describe(mask.num_visible_beyond_hash_layers, mask.num_experts)
    hashed = mask.provenance.hash_layers
    if not hashed:
        return beyond
    layers = f"the first {hashed.num_layers} layers" if hashed.num_layers > 1 else "the first layer"
    return f"in {layers}, {_describe(mask.num_visible_of_layer(0), mask.num_experts)}; after that, {beyond}"


def _describe(num_visible: np.ndarray, num_experts: int) -> str:
    """Say how many experts the ids of one table see.

    Args:
        num_visible: visible experts of each id, `[vocab]`.
        num_experts: experts of a layer.
    """
    several = num_visible[num_visible > 1] if num_visible.max() > 1 else num_visible
    fewest, most = several.min(), several.max()
    experts = f"{fewest} to {most} of {num_experts} experts" if fewest < most else f"{most} of {num_experts} experts"
    if fewest == num_experts:
        experts = f"all {num_experts} experts"
    if len(several) == len(num_visible):
        return f"every id sees {experts}"
    verb = "sees" if len(several) == 1 else "see"
    return f"{len(several):,} of {len(num_visible):,} ids {verb} {experts}; every other id sees 1 expert"
