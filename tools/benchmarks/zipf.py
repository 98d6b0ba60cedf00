"""Zipf-distributed token ids, and masks built from their frequencies."""

import numpy as np

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask


def zipf_probabilities(vocab_size: int) -> np.ndarray:
    """Return the share of each id, float64 [vocab]."""
    weights = 1 / np.arange(1, vocab_size + 1)
    return weights / weights.sum()


def zipf_mask(recipe: MaskRecipe, vocab_size: int) -> RoutingMask:
    """Build the mask of a recipe for Zipf-distributed ids."""
    counts = (zipf_probabilities(vocab_size) * 10**9).astype(np.int64)[None]
    dataset = {"name": "zipf", "num_tokens": int(counts.sum()), "idx_sha256": "", "bin_bytes": 0}
    return build_routing_mask(recipe, frequency=TokenFrequency(counts, (None,), (dataset,), None), workers=1)
