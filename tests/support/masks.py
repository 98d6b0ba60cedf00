"""Small routing masks that are built from token counts."""

from pathlib import Path

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency
from maskmoe.routing_mask.mask import RoutingMask


def count_ids(prefix: Path, vocab_size: int) -> TokenFrequency:
    """Count the token ids of one dataset."""
    return count_token_frequency([str(prefix)], vocab_size, workers=1)


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
