"""A widened mask contains the mask that it was made from, and says so."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import covering_ids, frequency_of
from support.paths import ROOT
from widen_routing_mask import widen_routing_mask

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import LOAD_JITTER, MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, expected_expert_load
from maskmoe.routing_mask.mask import HashLayers, MaskChange, RoutingMask


@pytest.fixture
def zipf_frequency():
    """A function that returns Zipf-distributed counts with ids in random order; some ids may never occur."""

    def make(vocab_size: int, num_tokens: int) -> TokenFrequency:
        rng = np.random.default_rng(0)
        probabilities = 1 / np.arange(1, vocab_size + 1)
        return frequency_of(rng.permutation(rng.multinomial(num_tokens, probabilities / probabilities.sum())))

    return make


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
    num_pairs = mask.vocab_size * mask.num_layers
    assert MaskChange.between(mask, wider) == MaskChange(num_pairs, changed, changed)
    assert MaskChange.between(wider, mask) == MaskChange(num_pairs, changed, 0)
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


@pytest.mark.parametrize(("num_ranks", "topk"), [(None, 1), (2, 1), (None, 3)])
def test_balanced_widening_puts_experts_where_the_load_is_least(zipf_frequency, num_ranks, topk):
    frequency = zipf_frequency(4000, 10**6)
    assignment = "rank-local" if num_ranks else "balanced"
    recipe = MaskRecipe(16, 3, assignment, 0.3, 2, expert_model_parallel_size=num_ranks, topk=topk)
    mask = build_routing_mask(recipe, frequency=frequency)
    wider = widen_routing_mask(mask, frequency=frequency, frequent_mass=0.5, frequent_visible_experts=4)
    loads = expected_expert_load(wider, frequency.occurrences, topk)
    for layer in range(3):
        follow_choices(mask.visible_sets(layer), wider.visible_sets(layer), frequency.occurrences, topk, num_ranks or 1)
    # The same sizes by uniform draws, as a mask of the assignment `uniform` is widened.
    provenance = replace(mask.provenance, assignment="uniform", expert_model_parallel_size=None)
    uniform = replace(mask, provenance=provenance)
    drawn = widen_routing_mask(uniform, frequency=frequency, frequent_mass=0.5, frequent_visible_experts=4)
    assert (loads.std(axis=1) < 0.5 * expected_expert_load(drawn, frequency.occurrences, topk).std(axis=1)).all()


def follow_choices(old: np.ndarray, new: np.ndarray, occurrences: np.ndarray, topk: int, num_ranks: int) -> None:
    """Check for one id after the other that its further experts had the least load but for the jitter.

    Args:
        old: the visible sets before, bool [vocab, N].
        new: the visible sets after.
        occurrences: occurrences of each id, [vocab].
        topk: number of experts that an id uses if it sees so many.
        num_ranks: number of ranks; the further experts of an id are on the rank of its experts.
    """
    sizes = new.sum(axis=1)
    shares = occurrences * np.minimum(sizes, topk) / sizes
    loads = shares @ old
    later = shares @ (new & ~old).sum(axis=1) / len(loads)
    for token_id in np.argsort(-occurrences, kind="stable"):
        added = new[token_id] & ~old[token_id]
        if added.any():
            rank = old[token_id].reshape(num_ranks, -1).any(axis=1)
            left = np.repeat(rank, len(loads) // num_ranks) & ~new[token_id]
            later -= shares[token_id] * added.sum() / len(loads)
            jitter = LOAD_JITTER * (shares[token_id] + later)
            assert loads[added].max() <= 1e-6 + loads[left].min(initial=np.inf) + jitter
            loads[added] += shares[token_id]
    np.testing.assert_allclose(loads, shares @ new)


def test_uniform_widening_adds_every_expert_equally_often():
    mask = build_routing_mask(MaskRecipe.from_preset("top-k-hash", 6, 1, frequent_visible_experts=2), vocab_size=20000)
    wider = widen_routing_mask(mask, frequent_visible_experts=4, seed=3)
    assert wider.provenance.preset == "top-k-hash"
    added = (wider.visible_sets(0) & ~mask.visible_sets(0)).sum(axis=0)
    expected = 2 * 20000 / 6
    assert ((added - expected) ** 2 / expected).sum() < 20.5  # chi-square with 5 degrees of freedom: p = 0.001


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({}, "--frequent-mass"),
        ({"frequent_mass": 0.3}, "mass 0.3"),
        ({"frequent_visible_experts": 2}, "visible experts 2"),
        ({"frequent_visible_experts": 9}, "2 to 8 of 8 experts, not 9"),
        ({"frequent_visible_experts": 4, "frequency": None}, "--token-frequency"),
        ({"frequent_mass": 0.5, "frequency": frequency_of([1, 2])}, "counts are for 2 ids"),
    ],
)
def test_settings_that_narrow_or_do_not_fit_are_refused(zipf_frequency, chosen, names):
    frequency = zipf_frequency(100, 5000)
    mask = build_routing_mask(MaskRecipe(8, 2, "balanced", 0.4, 3), frequency=frequency)
    with pytest.raises(UserError, match=names):
        widen_routing_mask(mask, **{"frequency": frequency} | chosen)


def test_command_line(tmp_path):
    frequency = frequency_of([1000 // (token + 1) for token in range(300)])
    frequency.save(tmp_path / "counts.safetensors")
    mask = build_routing_mask(MaskRecipe(8, 3, "balanced", 0.4, 2), frequency=frequency)
    mask.save(tmp_path / "mask.safetensors")
    flags = "--routing-mask mask.safetensors --token-frequency counts.safetensors --frequent-visible-experts 4"
    words = (sys.executable, ROOT / "tools" / "studies" / "widen_routing_mask.py", *flags.split(), "--output")
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = run([*words, "wider.safetensors"]).stdout
    wider = RoutingMask.load(tmp_path / "wider.safetensors")
    change = MaskChange.between(mask, wider)
    assert change.num_changed == change.num_grown == 3 * np.count_nonzero(mask.num_visible_of_layer(0) == 2)
    for words_of_line in (f"{change.num_changed} of 900", "2 → 4 (largest)", f"{mask.digest}", f"{wider.digest}"):
        assert words_of_line in said
    assert run([*words, "mask.safetensors", "--force"]).returncode == 2
    assert RoutingMask.load(tmp_path / "mask.safetensors").digest == mask.digest
