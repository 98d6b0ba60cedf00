"""A widened mask contains the mask that it was made from, and says so."""

from hypothesis import given
from hypothesis import strategies as st
from support.datasets import covering_ids, frequency_of
from widen_routing_mask import widen_routing_mask

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import HashLayers, RoutingMask


@st.composite
def masks(draw) -> tuple[RoutingMask, TokenFrequency]:
    """Draw masks of all assignments, with and without hash layers and frequent ids, and the counts of their ids."""
    num_ranks = draw(st.sampled_from([1, 2, 4]))
    num_experts = num_ranks * draw(st.integers(2, 5))
    assignment = draw(st.sampled_from(["uniform", "balanced", "rank-local"]))
    most_visible = num_experts // num_ranks if assignment == "rank-local" else num_experts
    hashed = st.builds(HashLayers, st.just(1), st.integers(1, most_visible), st.just(assignment))
    mass = draw(st.sampled_from([0.0, 0.3, 0.8]))
    recipe = MaskRecipe(
        num_experts,
        num_layers=3,
        assignment=assignment,
        frequent_mass=mass,
        frequent_visible_experts=draw(st.integers(2, most_visible)) if mass else None,
        seed=draw(st.integers(0, 9)),
        expert_model_parallel_size=num_ranks if assignment == "rank-local" else None,
        hash_layers=draw(st.none() | hashed),
    )
    frequency = frequency_of(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)))
    return build_routing_mask(recipe, frequency=frequency), frequency


@st.composite
def widenings(draw) -> tuple[RoutingMask, RoutingMask, TokenFrequency, dict]:
    """Draw a mask, the wider mask, and the counts and settings that it was widened with."""
    mask, frequency = draw(masks())
    made_from = mask.provenance
    most_visible = mask.num_experts // (made_from.expert_model_parallel_size or 1)
    chosen = {
        "frequent_mass": draw(st.sampled_from([mass for mass in (0.3, 0.8, 1.0) if mass >= made_from.frequent_mass])),
        "frequent_visible_experts": draw(st.integers(made_from.frequent_visible_experts or 2, most_visible)),
        "seed": draw(st.integers(0, 9)),
    }
    counts = draw(st.just(frequency) | st.permutations(frequency.counts[0].tolist()).map(frequency_of))
    return mask, widen_routing_mask(mask, frequency=counts, **chosen), counts, chosen


@given(widenings())
def test_sets_only_grow_to_the_number_of_a_frequent_id(widening):
    mask, wider, frequency, chosen = widening
    frequent = covering_ids(frequency.occurrences, chosen["frequent_mass"])
    num_hashed = mask.provenance.hash_layers.num_layers if mask.provenance.hash_layers else 0
    for layer in range(mask.num_layers):
        old, new = mask.visible_sets(layer), wider.visible_sets(layer)
        assert not (old & ~new).any()
        for token, (before, after) in enumerate(zip(old.sum(axis=1), new.sum(axis=1), strict=True)):
            is_frequent = layer >= num_hashed and (before > 1 or token in frequent)
            assert after == (chosen["frequent_visible_experts"] if is_frequent else before)
