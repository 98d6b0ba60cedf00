"""Describes a routing mask in words."""

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask


def describe_visible_experts(mask: RoutingMask) -> str:
    """Say how many experts the ids see, in one clause; hash layers come first if the mask has some."""
    hashed, num_experts = mask.provenance.hash_layers, mask.num_experts
    if not hashed:
        return _describe(mask.num_visible_beyond_hash_layers, num_experts)
    of_hash_layers = _describe(np.full(1, hashed.visible_experts), num_experts)
    layers = f"the first {hashed.num_layers} layers" if hashed.num_layers > 1 else "the first layer"
    return f"in {layers}, {of_hash_layers}; after that, {_describe(mask.num_visible_beyond_hash_layers, num_experts)}"


def _describe(num_visible: np.ndarray, num_experts: int) -> str:
    """Say how many experts the ids of one table see.

    Args:
        num_visible: visible experts of each id, `[vocab]`.
        num_experts: experts of a layer.
    """
    fewest, most = num_visible.min(), num_visible.max()
    if fewest == most:
        return f"every id sees {_count(most, most, num_experts)}"
    if fewest > 1:
        return f"every id sees {_count(fewest, most, num_experts)}"
    several = num_visible[num_visible > 1]
    verb = "sees" if len(several) == 1 else "see"
    counted = _count(several.min(), several.max(), num_experts)
    return f"{len(several):,} of {len(num_visible):,} ids {verb} {counted}; every other id sees 1 expert"


def _count(fewest: int, most: int, num_experts: int) -> str:
    if fewest < most:
        return f"{fewest} to {most} of {num_experts} experts"
    if most == num_experts:
        return f"all {num_experts} experts" if num_experts > 1 else "the only expert"
    return f"{most} of {num_experts} experts"
