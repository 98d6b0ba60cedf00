from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import (
    HashLayers,
    MaskProvenance,
    RoutingMask,
    mean_experts_per_token,
)

PROVENANCE = MaskProvenance("uniform", 0.5, 2, seed=0)


def pack(sets: list[list[set[int]]], num_experts: int) -> np.ndarray:
    """Return the visible bits [tables, rows, bytes] of sets of experts."""
    bits = np.zeros((len(sets), len(sets[0]), -(-num_experts // 8)), dtype=np.uint8)
    for table, row in np.ndindex(bits.shape[:2]):
        for expert in sets[table][row]:
            bits[table, row, expert // 8] |= 1 << expert % 8
    return bits


def small_mask(**changes) -> RoutingMask:
    parts = {
        "row_of_id": np.array([[0, 3, 2, 4], [1, 4, 3, 0]], dtype=np.int16),
        "visible_bits": pack([[{0}, {1}, {2}, {0, 2}, {1, 2}], [{0}, {1}, {2}, {0, 1, 2}, {0, 1}]], 3),
        "vocab_size": 4,
        "num_experts": 3,
        "num_layers": 2,
        "provenance": PROVENANCE,
    }
    return RoutingMask(**parts | changes)


def test_look_up():
    mask = small_mask()
    expected = [[{0}, {0, 2}, {2}, {1, 2}], [{1}, {0, 1}, {0, 1, 2}, {0}]]
    for layer, sets in enumerate(expected):
        assert [set(np.flatnonzero(row)) for row in mask.visible_sets(layer)] == sets
        assert mask.num_visible_of_layer(layer).tolist() == [len(experts) for experts in sets]
        row_of_id, visible_bits = mask.table_of_layer(layer)
        assert row_of_id.shape == (4,)
        assert visible_bits.shape == (5, 1)
    assert (mask.min_visible, mask.max_visible) == (1, 3)
    assert not mask.is_shared
    for layer in (-1, 2):
        with pytest.raises(IndexError, match=f"layers 0 to 1, but no layer {layer}$"):
            mask.num_visible_of_layer(layer)


def test_a_shared_table_serves_all_layers(zipf_frequency):
    recipe = MaskRecipe(10, 3, "balanced", 0.5, 3, seed=7)
    frequency = zipf_frequency(200, 5000)
    per_layer = build_routing_mask(recipe, frequency=frequency)
    shared = build_routing_mask(replace(recipe, shared_table=True), frequency=frequency)
    assert shared.is_shared
    assert shared.num_layers == 3
    for layer in range(3):
        assert np.array_equal(shared.visible_sets(layer), per_layer.visible_sets(0))
    assert not np.array_equal(per_layer.visible_sets(0), per_layer.visible_sets(1))
    assert shared.nbytes * 3 == per_layer.nbytes


def test_a_large_mask_stays_under_20_mib(zipf_frequency, tmp_path):
    frequency = zipf_frequency(131072, 10**9)
    recipe = MaskRecipe(256, 64, "uniform", 0.4, 8)
    mask = build_routing_mask(recipe, frequency=frequency, workers=1)
    mask.save(tmp_path / "mask.safetensors")
    assert mask.nbytes <= 20 * 2**20
    assert (tmp_path / "mask.safetensors").stat().st_size <= 20 * 2**20


def test_embedding_in_another_file(mask):
    tensors, metadata = mask.to_tensors()
    assert all(isinstance(value, str) for value in metadata.values())
    assert RoutingMask.from_tensors(tensors, metadata).digest == mask.digest
    tensors["row_of_id"][0, 0] += 1  # a copy: the mask itself is not touched
    with pytest.raises(UserError, match="checkpoint 7 was altered"):
        RoutingMask.from_tensors(tensors, metadata, source="checkpoint 7")
    assert RoutingMask.from_tensors(*mask.to_tensors()).digest == mask.digest


def test_a_mask_cannot_be_changed(mask):
    with pytest.raises(ValueError, match="read-only"):
        mask.row_of_id[0, 0] = 1


BITS = [
    [{0}, {1}, {2}, set(), {1, 2}],
    [{0}, {1}, {2}, {0}, {1, 2}],
    [{0}, {1}, {2}, {0, 3}, {1, 2}],
    [{1}, {0}, {2}, {0, 1}, {1, 2}],
    [{0}, {1}],
]
ARRAYS = {
    "visible_bits": [np.zeros((2, 5, 2), np.uint8), np.zeros(5, np.uint8), np.zeros((2, 5, 1), np.int8)],
    "row_of_id": [
        *(np.array([[0, 3, 2, row]] * 2, np.int16) for row in (5, -1)),
        *(np.zeros(shape, np.int16) for shape in ((2, 3), 4)),
    ],
}
UNFIT = [
    *({"visible_bits": pack([sets] * 2, 3)} for sets in BITS),
    *({name: array} for name, arrays in ARRAYS.items() for array in arrays),
    *({"num_layers": 3}, {"num_experts": 0}, {"num_layers": 1 << 40}),
]


@pytest.mark.parametrize("changes", UNFIT)
def test_parts_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(UserError):
        small_mask(**changes)


def test_check_fits(mask):
    model = {"vocab_size": 200, "num_experts": 10, "layers": FeedForwardLayers((True,) * 3)}
    mask.check_fits(**model)
    mask.check_fits(**model, expert_model_parallel_size=2)
    mask.check_fits(**model, expert_model_parallel_size=5)
    for name, what in (("vocab_size", "vocabulary"), ("num_experts", "experts")):
        with pytest.raises(UserError, match=f"{what}.* is {model[name]}, the model's is 12"):
            mask.check_fits(**model | {name: 12})
    # A table for each MoE layer, or for each MLP, too; layers of multi-token prediction count.
    for layers in (
        FeedForwardLayers((False, True, False, True), (True,)),
        FeedForwardLayers((True, False), (True,)),
        FeedForwardLayers.of_pattern("*-*E|*E/*E"),
    ):
        mask.check_fits(**model | {"layers": layers})
    message = "it is for 3 MoE layers, the model has 4, and 1 feed-forward layers without experts"
    with pytest.raises(UserError, match=message):
        mask.check_fits(**model | {"layers": FeedForwardLayers.of_pattern("*-*E*E*E/*E")})


def test_check_fits_of_shared_and_rank_local_masks(zipf_frequency):
    recipe = MaskRecipe(8, 3, "rank-local", 0.5, 2, expert_model_parallel_size=4, shared_table=True)
    mask = build_routing_mask(recipe, frequency=zipf_frequency(200, 5000))
    model = {"vocab_size": 200, "num_experts": 8, "layers": FeedForwardLayers((True,) * 99)}
    mask.check_fits(**model)
    for divisor in (1, 2, 4):
        mask.check_fits(**model, expert_model_parallel_size=divisor)
        assert mask.is_rank_local(divisor)
    with pytest.raises(UserError, match="expert parallel size 4, the run's is 8"):
        mask.check_fits(**model, expert_model_parallel_size=8)
    for recipe in (MaskRecipe.from_preset("smoe", 8, 1), MaskRecipe.from_preset("smoe", 8, 3)):
        build_routing_mask(recipe, vocab_size=200).check_fits(**model)


def test_files_of_other_kinds_are_refused(mask, zipf_frequency, tmp_path):
    counts = tmp_path / "counts.safetensors"
    zipf_frequency(20, 100).save(counts)
    with pytest.raises(UserError, match="is a token frequency file, expected a routing mask"):
        RoutingMask.load(counts)
    with pytest.raises(UserError, match=r"^routing mask file .*/missing\.safetensors does not exist$"):
        RoutingMask.load(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match=r"^routing mask file .* is a folder, not a file$"):
        RoutingMask.load(tmp_path)
    save_file(mask.to_tensors()[0], tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="not a routing mask file"):
        RoutingMask.load(tmp_path / "bare.safetensors")


def test_mean_number_of_experts_is_that_of_the_layers_with_experts():
    recipe = MaskRecipe.from_preset("smoe", 8, 4, hash_layers=HashLayers(2, 2, "uniform"))
    mask = build_routing_mask(recipe, vocab_size=50)
    layers = {
        freq: FeedForwardLayers.of_frequency(list(map(int, freq)), len(freq)) for freq in ("1111", "0111", "0011")
    }
    assert mean_experts_per_token(mask, 4, layers["1111"]) == 3.0
    assert mean_experts_per_token(mask, 4, layers["0111"]) == pytest.approx(10 / 3)
    assert mean_experts_per_token(mask, 4, layers["0011"]) == 4.0
    assert mean_experts_per_token(mask, 2, layers["1111"]) == 2.0
    # A mask with a table for each MoE layer is for the MoE layers in order.
    assert mean_experts_per_token(mask, 4, FeedForwardLayers.of_pattern("-E-EE*E")) == 3.0
    shared = build_routing_mask(MaskRecipe.from_preset("hash", 8, 1, shared_table=True), vocab_size=50)
    assert mean_experts_per_token(shared, 4, layers["1111"]) == 1.0
    assert mean_experts_per_token(None, 4, layers["1111"]) == 4
