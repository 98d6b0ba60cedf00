"""A widened mask contains the mask that it was made from, and says so."""

from hypothesis import given
from hypothesis import strategies as st
from support.datasets import covering_ids, frequency_of
from widen_routing_mask import count_changes, widen_routing_mask

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


@given(widenings())
def test_provenance_and_change(widening):
    """The wider mask records the mask before and stays rank-local, and its change counts the sets that differ."""
    mask, wider, frequency, chosen = widening
    changed = sum((mask.visible_sets(n) != wider.visible_sets(n)).any(axis=1).sum() for n in range(mask.num_layers))
    assert count_changes(mask, wider) == changed
    assert (wider is mask) == (changed == 0)
    assert widen_routing_mask(wider, frequency=frequency, **chosen) is wider
    assert widen_routing_mask(mask, frequency=frequency, **chosen).digest == wider.digest
    assert RoutingMask.from_tensors(*wider.to_tensors()).digest == wider.digest
    made_from, provenance = mask.provenance, wider.provenance
    if num_ranks := made_from.expert_model_parallel_size:
        assert wider.rank_of_rows(num_ranks) is not None
    if wider is not mask:
        (ancestor,) = provenance.widened_from
        assert ancestor["digest"] == mask.digest
        assert ancestor["frequent_visible_experts"] == made_from.frequent_visible_experts
        assert {name: getattr(provenance, name) for name in chosen} == chosen
        assert provenance.counts_digest == frequency.digest
        kept = ("assignment", "hash_layers", "expert_model_parallel_size")
        assert all(getattr(provenance, name) == getattr(made_from, name) for name in kept)
