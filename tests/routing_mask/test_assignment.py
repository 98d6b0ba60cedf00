import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.datasets import covering_ids

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, Vocabulary, assign_table, build_routing_mask, uniform_subsets
from maskmoe.routing_mask.mask import HashLayers, RoutingMask


def visible_sets(recipe: MaskRecipe, occurrences: np.ndarray, table: int = 0) -> np.ndarray:
    """Return the visible sets, bool [vocab, experts], unpacked independently of the package."""
    row_of_id, visible_bits = assign_table(recipe, occurrences, table)
    bits = [[visible_bits[row, e // 8] >> (e % 8) & 1 for e in range(recipe.num_experts)] for row in row_of_id]
    return np.array(bits, dtype=bool)


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any),
    mass=st.integers(0, 100).map(lambda percent: percent / 100),
)
@example(counts=[7] + [1] * 93, mass=0.07)  # 0.07 * 100 > 7 in floating point
def test_frequent_ids_are_the_shortest_prefix_that_covers_the_mass(counts, mass):
    recipe = MaskRecipe(8, 1, "uniform", mass, 2)
    vocabulary = Vocabulary(np.array(counts, dtype=np.float64), recipe)
    frequent = vocabulary.ids[: vocabulary.num_frequent].tolist()
    assert set(frequent) == covering_ids(counts, mass)
    assert frequent == sorted(frequent, key=lambda token: (-counts[token], token))


def test_all_mass_makes_every_seen_id_frequent_even_one_that_vanishes_in_the_sum():
    recipe = MaskRecipe(8, 1, "uniform", 1.0, 2)
    vocabulary = Vocabulary(np.array([1e18, 0.25, 0.0]), recipe)
    assert vocabulary.ids[: vocabulary.num_frequent].tolist() == [0, 1]


@st.composite
def recipes_and_counts(draw):
    num_ranks = draw(st.sampled_from([1, 2, 4]))
    num_experts = num_ranks * draw(st.integers(2, 9))
    assignment = draw(st.sampled_from(["uniform", "balanced", "rank-local"]))
    most_visible = num_experts // num_ranks if assignment == "rank-local" else num_experts
    recipe = MaskRecipe(
        num_experts,
        num_layers=3,
        assignment=assignment,
        frequent_mass=draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        frequent_visible_experts=draw(st.integers(2, most_visible)),
        seed=draw(st.integers(0, 2**64)),
        expert_model_parallel_size=num_ranks if assignment == "rank-local" else None,
        topk=draw(st.integers(1, min(4, num_experts))),
    )
    counts = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=60).filter(any))
    return recipe, np.array(counts, dtype=np.float64)


@given(recipes_and_counts())
def test_every_id_sees_exactly_its_number_of_experts(recipe_and_counts):
    """In a rank-local mask, the experts of an id lie on one rank."""
    recipe, counts = recipe_and_counts
    visible = visible_sets(recipe, counts)
    frequent = covering_ids(counts, recipe.frequent_mass)
    expected = [recipe.frequent_visible_experts if token in frequent else 1 for token in range(len(counts))]
    assert visible.sum(axis=1).tolist() == expected
    of_ranks = visible.reshape(len(counts), recipe.num_ranks, -1).any(axis=2)
    assert (of_ranks.sum(axis=1) == 1).all() or recipe.assignment != "rank-local"


@given(
    counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=200),
    num_experts=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_balanced_load_exceeds_the_mean_by_little_more_than_one_id(counts, num_experts, seed):
    counts = np.array(counts, dtype=np.float64)
    load = counts @ visible_sets(MaskRecipe(num_experts, 1, "balanced", 0.0, seed=seed), counts)
    # When an expert received its last id, its load was at most the mean plus a random half of the largest id.
    assert load.max() <= load.mean() + 1.5 * counts.max()


@pytest.mark.parametrize(("num_ranks", "topk"), [(None, 1), (4, 1), (None, 3), (4, 8)])
def test_balanced_and_rank_local_level_a_zipf_vocabulary(zipf_frequency, num_ranks, topk):
    occurrences = zipf_frequency(4000, 10**6).occurrences
    assignment = "rank-local" if num_ranks else "balanced"
    recipe = MaskRecipe(16, 4, assignment, 0.4, 4, expert_model_parallel_size=num_ranks, topk=topk)
    for table in range(4):
        visible = visible_sets(recipe, occurrences, table)
        sizes = visible.sum(axis=1)
        load = (occurrences * np.minimum(sizes, topk) / sizes) @ visible
        assert load.max() < 1.001 * load.mean()
        rank_load = load.reshape(num_ranks or 1, -1).sum(axis=1)
        assert rank_load.max() < 1.001 * rank_load.mean()


@given(
    counts=st.lists(st.integers(1, 10), min_size=100, max_size=200),
    visible_experts=st.sampled_from([2, 4]),
    num_ranks=st.sampled_from([None, 2]),
    seed=st.integers(0, 2**64),
)
def test_visible_sets_overlap_if_their_size_divides_the_experts(counts, visible_experts, num_ranks, seed):
    """The experts do not fall into N / V_f groups, one of which each frequent id gets."""
    assignment = "rank-local" if num_ranks else "balanced"
    recipe = MaskRecipe(16, 1, assignment, 1.0, visible_experts, seed, expert_model_parallel_size=num_ranks)
    sets = visible_sets(recipe, np.array(counts, dtype=np.float64))
    assert len(np.unique(sets, axis=0)) > 16 / visible_experts


@pytest.mark.parametrize("assignment", ["balanced", "rank-local"])
def test_the_bytes_do_not_depend_on_the_processor(assignment):
    """The counts give ties, which the kernels of numpy for newer processors break in other ways: 1e20 + 1 == 1e20."""
    recipe = MaskRecipe(64, 1, assignment, 1.0, 7, expert_model_parallel_size=2 if assignment == "rank-local" else None)
    program = f"""
import hashlib, numpy
from maskmoe.routing_mask.assignment import MaskRecipe, assign_table
occurrences = numpy.repeat([1e20, 1.0], [60, 200])
print(*(hashlib.sha256(part.tobytes()).hexdigest() for part in assign_table({recipe!r}, occurrences, 0)))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env=os.environ | {"NPY_DISABLE_CPU_FEATURES": features},
            capture_output=True,
            check=True,
        ).stdout
        for features in ("", "X86_V3 X86_V4 AVX2 AVX512_SKX AVX512_ICL AVX512_SPR")
    }
    assert len(outputs) == 1


def test_uniform_draws_every_expert_and_every_set_equally_often():
    vocab_size, num_experts = 20000, 5
    experts = visible_sets(MaskRecipe(num_experts, 1, "uniform", 0.0, seed=3), np.zeros(vocab_size)).sum(axis=0)
    expected = vocab_size / num_experts
    assert ((experts - expected) ** 2 / expected).sum() < 18.5  # chi-square with 4 degrees of freedom: p = 0.001

    sets = uniform_subsets(np.random.default_rng(3), vocab_size, 3, num_experts)
    counts = np.array([(sets[:, list(three)].all(axis=1)).sum() for three in itertools.combinations(range(5), 3)])
    assert counts.sum() == vocab_size
    expected = vocab_size / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 9 degrees of freedom: p = 0.001


@pytest.mark.parametrize("assignment", ["uniform", "balanced", "rank-local"])
def test_ids_that_share_an_expert_in_one_table_rarely_do_in_the_next(zipf_frequency, assignment):
    occurrences = zipf_frequency(2000, 10**6).occurrences
    ranks = 4 if assignment == "rank-local" else None
    recipe = MaskRecipe(16, 2, assignment, 0.3, 4, expert_model_parallel_size=ranks)
    first, second = (visible_sets(recipe, occurrences, table) for table in range(2))
    single = first.sum(axis=1) == 1
    weights = np.sqrt(np.outer(occurrences[single], occurrences[single]))
    np.fill_diagonal(weights, 0)
    together = [(visible[single].astype(int) @ visible[single].T) > 0 for visible in (first, second)]
    repeated = weights[together[0] & together[1]].sum() / weights[together[0]].sum()
    assert repeated < 2 / 16  # by chance 1 / 16


@pytest.mark.parametrize(
    ("num_experts", "mass", "visible_experts", "num_ranks"),
    [(8, 0.0, None, None), (8, 0.4, 4, None), (64, 0.4, 8, None), (64, 0.6, 8, 8)],
)
def test_the_most_frequent_ids_have_other_companions_in_each_table(
    zipf_frequency, num_experts, mass, visible_experts, num_ranks
):
    """No pair of the most frequent ids shares nearly all experts in all tables, as ids of nearly equal counts might."""
    occurrences = np.sort(zipf_frequency(4000, 10**7).occurrences)[::-1]
    assignment = "rank-local" if num_ranks else "balanced"
    recipe = MaskRecipe(num_experts, 16, assignment, mass, visible_experts, expert_model_parallel_size=num_ranks)
    sets = np.stack([visible_sets(recipe, occurrences, table)[:20] for table in range(16)]).astype(int)
    shared = np.einsum("tin,tjn->ij", sets, sets) / 16  # [ids, ids], the mean over the tables
    np.fill_diagonal(shared, 0)
    assert shared.max() < 0.75 * (visible_experts or 1)


@pytest.mark.parametrize("assignment", ["uniform", "balanced", "rank-local"])
def test_ids_never_seen_are_spread_evenly(assignment):
    occurrences = np.zeros(8000)
    occurrences[:10] = np.arange(10, 0, -1)
    ranks = 2 if assignment == "rank-local" else None
    visible = visible_sets(MaskRecipe(8, 1, assignment, 0.3, 2, expert_model_parallel_size=ranks), occurrences)
    assert (visible[10:].sum(axis=1) == 1).all()
    per_expert = visible[10:].sum(axis=0)
    assert per_expert.max() - per_expert.min() <= (200 if assignment == "uniform" else 2)


@pytest.mark.parametrize("assignment", ["uniform", "balanced", "rank-local"])
@pytest.mark.parametrize("visible_experts", [1, 3])
def test_hash_layers_and_the_other_layers(zipf_frequency, assignment, visible_experts):
    """The other layers have the tables that they have without hash layers."""
    frequency = zipf_frequency(300, 10000)
    recipe = MaskRecipe(8, 5, assignment, 0.4, 4, expert_model_parallel_size=2 if assignment == "rank-local" else None)
    hashed = replace(recipe, hash_layers=HashLayers(2, visible_experts, assignment))
    mask, without = (build_routing_mask(each, frequency=frequency) for each in (hashed, recipe))
    for layer in range(5):
        sets = mask.visible_sets(layer)
        if layer < 2:
            assert (sets.sum(axis=1) == visible_experts).all()
            load = (frequency.occurrences / visible_experts) @ sets
            # One id has a sixth of the occurrences, so only sets of several experts can be balanced.
            assert assignment == "uniform" or visible_experts == 1 or load.max() < 1.05 * load.mean()
        else:
            assert np.array_equal(sets, without.visible_sets(layer))
    assert mask.is_rank_local(2) == (assignment == "rank-local")
    assert mask.provenance.hash_layers == HashLayers(2, visible_experts, assignment)
    loaded = RoutingMask.from_tensors(*mask.to_tensors())
    assert (loaded.digest, loaded.provenance) == (mask.digest, mask.provenance)
    assert "hash_layers" not in without.parts()[1]["provenance"]


HASH_LAYERS = [(0, 1, "uniform"), (2, 1, "uniform"), (1, 9, "uniform"), (1, 1, "random"), (1, 1, "rank-local")]
CONTRADICTORY = [
    *({"frequent_mass": mass} for mass in (1.1, -0.1, float("nan"))),
    *({"frequent_visible_experts": number} for number in (None, 1, 9)),
    *({"assignment": "rank-local", "expert_model_parallel_size": size} for size in (None, 3, 4)),
    *({"hash_layers": HashLayers(*settings)} for settings in HASH_LAYERS),
    {"hash_layers": HashLayers(1, 1, "uniform"), "shared_table": True},
    {"num_experts": 1},
    {"assignment": "random"},
    {"expert_model_parallel_size": 2},
]


@pytest.mark.parametrize("settings", CONTRADICTORY)
def test_contradictory_settings_are_refused(settings):
    sound = {"num_experts": 8, "num_layers": 2, "assignment": "uniform", "frequent_mass": 0.4}
    sound["frequent_visible_experts"] = 4
    MaskRecipe(**sound)
    with pytest.raises(UserError):
        MaskRecipe(**sound | settings)


@pytest.mark.parametrize(("assignment", "preset"), [("balanced", "hash-balanced"), ("uniform", "hash")])
def test_a_mask_without_frequent_ids_is_that_of_hash(zipf_frequency, assignment, preset):
    recipes = MaskRecipe(8, 3, assignment, 0.0, seed=4), MaskRecipe.from_preset(preset, 8, 3, seed=4)
    maskmoe, hashed = (build_routing_mask(recipe, frequency=zipf_frequency(200, 5000)) for recipe in recipes)
    assert np.array_equal(maskmoe.row_of_id, hashed.row_of_id)
    assert np.array_equal(maskmoe.visible_bits, hashed.visible_bits)


def test_baselines_that_ignore_counts_need_only_the_vocabulary_size():
    for assignment in ("uniform", "balanced"):
        recipe = MaskRecipe.from_preset("smoe", 9, 4, hash_layers=HashLayers(1, 2, assignment))
        assert recipe.needs_counts == (assignment == "balanced")
    mask = build_routing_mask(MaskRecipe.from_preset("hash", 9, 4), vocab_size=50)
    assert mask.num_visible_of_layer(0).tolist() == [1] * 50
    for recipe in (MaskRecipe.from_preset("hash-balanced", 9, 4), MaskRecipe(9, 4, "uniform", 0.4, 2)):
        with pytest.raises(UserError, match="--token-frequency"):
            build_routing_mask(recipe, vocab_size=50)
    with pytest.raises(UserError, match="vocabulary size is missing"):
        build_routing_mask(MaskRecipe.from_preset("smoe", 9, 4))
