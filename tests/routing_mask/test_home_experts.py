"""Home experts: one visible expert of each frequent id, balanced by frequency, beside unchanged visible sets."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import build_mask
from support.tools import assert_bad_input, run_tool

from maskmoe.errors import UserError
from maskmoe.routing_mask import MaskRecipe, RoutingMask, TokenFrequency, build_routing_mask
from maskmoe.routing_mask.home_experts import home_of_ids, load_of_homes, with_home_experts
from maskmoe.routing_mask.widening import widen_routing_mask


def frequency_of(counts: np.ndarray) -> TokenFrequency:
    dataset = {"name": "text", "num_tokens": int(counts.sum()), "idx_sha256": "0" * 64, "bin_bytes": 0}
    return TokenFrequency(counts[None].astype(np.int64), (None,), (dataset,), None)


@settings(max_examples=60)
@given(st.sampled_from(["uniform", "balanced", "rank-local"]), st.integers(2, 4), st.sampled_from([0.3, 1.0]))
def test_homes_are_visible_and_sets_do_not_change(assignment, num_visible, mass) -> None:
    counts = np.random.default_rng(num_visible).integers(0, 1000, 60)
    counts[:20] = 0
    frequency = frequency_of(counts)
    ranks = 2 if assignment == "rank-local" else None
    plain = build_mask(
        frequency,
        8,
        3,
        assignment,
        frequent_mass=mass,
        frequent_visible_experts=num_visible,
        expert_model_parallel_size=ranks,
    )
    mask = with_home_experts(plain, frequency)
    for layer in range(3):
        visible, homes = mask.visible_sets(layer), home_of_ids(mask, layer)
        assert (visible == plain.visible_sets(layer)).all()
        assert visible[np.arange(60), homes].all()
    assert mask.provenance == plain.provenance
    assert mask.digest != plain.digest


@pytest.mark.parametrize("num_visible", [4, 8])
@pytest.mark.parametrize("mass", [0.4, 0.9, 1.0])
def test_homes_are_balanced_like_a_hash_layer(mass, num_visible) -> None:
    """No expert gets more than the even share plus the most frequent id, the bound of greedy placement."""
    counts = 1_000_000 // np.arange(10, 2010)
    frequency = frequency_of(counts)
    plain = build_mask(frequency, 8, 2, frequent_mass=mass, frequent_visible_experts=num_visible)
    load = load_of_homes(with_home_experts(plain, frequency), frequency.occurrences)
    assert load.max() / load.mean() < 1.05
    assert (load.sum(axis=1) == counts.sum()).all()


def test_tables_have_different_homes_and_the_same_call_gives_the_same_homes() -> None:
    frequency = frequency_of(1_000_000 // np.arange(10, 2010))
    recipe = MaskRecipe.from_preset("smoe", 8, 3)
    mask = with_home_experts(build_routing_mask(recipe, frequency=frequency), frequency)
    homes = [home_of_ids(mask, layer) for layer in range(3)]
    assert len(mask.row_of_id) == 3
    assert mask.visible_bits.shape[1] == 16  # a row for each expert, and a row for all experts with each home
    # Pairs of ids that share a home share another layer's home about as rarely as by chance.
    together = [of_layer[:, None] == of_layer for of_layer in homes]
    assert (together[0] & together[1]).sum() / together[0].sum() < 0.2
    again = with_home_experts(build_routing_mask(recipe, frequency=frequency), frequency)
    assert again.digest == mask.digest


def test_file_holds_the_homes_and_its_digest_protects_them(tmp_path) -> None:
    frequency = frequency_of(np.arange(1, 41))
    mask = with_home_experts(build_mask(frequency, 4, 2, frequent_visible_experts=2), frequency)
    mask.save(tmp_path / "mask.safetensors")
    read = RoutingMask.load(tmp_path / "mask.safetensors")
    assert read.digest == mask.digest
    assert (read.home_of_row == mask.home_of_row).all()
    tensors, metadata = mask.to_tensors()
    row = tensors["row_of_id"].max()
    other = np.flatnonzero(mask.visible_sets(0)[tensors["row_of_id"][0] == row][0])
    tensors["home_of_row"][0, row] = other[other != tensors["home_of_row"][0, row]][0]
    with pytest.raises(UserError, match="was altered or damaged"):
        RoutingMask.from_tensors(tensors, metadata)
    del tensors["home_of_row"]
    with pytest.raises(UserError, match="was altered or damaged"):
        RoutingMask.from_tensors(tensors, metadata)


def test_invalid_homes_are_refused() -> None:
    frequency = frequency_of(np.arange(1, 41))
    mask = with_home_experts(build_mask(frequency, 4, 1, frequent_visible_experts=2), frequency)
    hidden = (mask.home_of_row + 1) % 4
    for homes, problem in (
        (hidden, "not visible"),
        (mask.home_of_row[:, :-1], "home experts"),
        (mask.home_of_row.astype(float), "home experts"),
        (mask.home_of_row + 4, "outside"),
    ):
        with pytest.raises(UserError, match=problem):
            replace(mask, home_of_row=homes)


def test_masks_without_frequent_ids_and_wider_masks_are_refused() -> None:
    frequency = frequency_of(np.arange(1, 41))
    hashed = build_routing_mask(MaskRecipe.from_preset("hash-balanced", 4, 1), frequency=frequency)
    with pytest.raises(UserError, match="every id of the mask sees one"):
        with_home_experts(hashed, frequency)
    plain = build_mask(frequency, 4, 1, frequent_visible_experts=2)
    with pytest.raises(UserError, match="counts are for 39 ids"):
        with_home_experts(plain, frequency_of(np.arange(1, 40)))
    with pytest.raises(UserError, match="with home experts cannot be widened"):
        widen_routing_mask(with_home_experts(plain, frequency), frequent_visible_experts=3, frequency=frequency)


def test_command_builds_a_mask_with_homes(tmp_path) -> None:
    frequency_of(1_000_000 // np.arange(10, 2010)).save(tmp_path / "counts.safetensors")
    common = ("build_routing_mask", "--num-experts", "8", "--num-layers", "2", "--home-experts", "--output")
    output = str(tmp_path / "mask.safetensors")
    flags = ("--frequent-mass", "0.8", "--frequent-visible-experts", "8", "--assignment", "balanced")
    printed = run_tool(*common, output, "--token-frequency", str(tmp_path / "counts.safetensors"), *flags)
    assert "load of homes    expected max/mean 1.0" in printed.stdout
    assert RoutingMask.load(output).home_of_row is not None
    no_counts = run_tool(*common, output, "--vocab-size", "20", "--preset", "smoe", "--force")
    assert_bad_input(no_counts, "home experts are balanced by the frequency of each id; give --token-frequency")
