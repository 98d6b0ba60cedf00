"""Small routing masks that are built from token counts."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency
from maskmoe.routing_mask.mask import RoutingMask


def count_ids(prefix: Path, vocab_size: int) -> TokenFrequency:
    """Count the token ids of one dataset."""
    return count_token_frequency([str(prefix)], vocab_size, workers=1)


def frequency_of(counts: ArrayLike, tokenizer: TokenizerRecord | None = None) -> TokenFrequency:
    """Return token counts of one dataset, without a dataset."""
    counts = np.array(counts, np.int64)[None]
    dataset = {"name": "text", "num_tokens": int(counts.sum()), "idx_sha256": "0" * 64, "bin_bytes": 0}
    return TokenFrequency(counts, (None,), (dataset,), tokenizer)


def covering_ids(counts: ArrayLike, mass: float) -> set[int]:
    """Return the shortest prefix of the ids by descending count, then by id, that covers a share of whole counts."""
    counts = np.array(counts, np.int64).tolist()
    order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    length = 0
    while sum(counts[token] for token in order[:length]) < Fraction(str(mass)) * sum(counts):
        length += 1
    return set(order[:length])


def build_mask(
    frequency: TokenFrequency,
    num_experts: int,
    num_layers: int,
    assignment: str = "balanced",
    *,
    frequent_mass: float = 0.4,
    frequent_visible_experts: int | None = 4,
    seed: int = 1,
    expert_model_parallel_size: int | None = None,
) -> RoutingMask:
    """Build a routing mask; arguments as for `MaskRecipe`."""
    recipe = MaskRecipe(
        num_experts,
        num_layers,
        assignment,
        frequent_mass,
        frequent_visible_experts,
        seed=seed,
        expert_model_parallel_size=expert_model_parallel_size,
    )
    return build_routing_mask(recipe, frequency=frequency, workers=1)
