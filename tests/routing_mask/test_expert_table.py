"""Reads and writes tables of experts, and turns them into masks with V = k and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.command_lines import Outcome, run_command
from support.datasets import frequency_of
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.huggingface.modeling_maskmoe import MaskMoETopKRouter
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.expert_table import TENSOR_NAMES, ExpertTable, positions_of_layers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.routing_mask.tables import stack_tables

VOCAB_SIZE, NUM_EXPERTS, NUM_LAYERS = 50, 12, 4
TENSOR = "model.layers.{layer}.mlp.gate.tid2eid"


def random_table(seed: int, k: int = 3, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Return a table [vocab, k] without repeats."""
    order = np.random.default_rng(seed).random((vocab_size, NUM_EXPERTS)).argsort(axis=1)
    return np.ascontiguousarray(order[:, :k])  # safetensors ignores strides


def assert_shows(mask: RoutingMask, layer: int, table: np.ndarray) -> None:
    sets = mask.visible_sets(layer)
    assert [set(np.flatnonzero(row)) for row in sets] == [set(row) for row in table.tolist()]


MODEL = ["--num-experts", NUM_EXPERTS, "--num-layers", NUM_LAYERS]


def build(*arguments: object, folder: Path, output: str = "mask.safetensors") -> Outcome:
    return run_command("mask", *MODEL, *arguments, "--output", output, folder=folder)


@st.composite
def tables_of_layers(draw: st.DrawFn) -> list[np.ndarray | None]:
    """Draw for each layer a table without repeats, or None in the last layers; at least one layer has a table."""
    vocab_size, topk, layers = draw(st.integers(1, 20)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    hashed = draw(st.integers(1, layers))
    tables = [random_table(draw(st.integers(0, 1 << 30)), topk, vocab_size) for _ in range(hashed)]
    return [*tables, *[None] * (layers - hashed)]


@given(tables_of_layers())
def test_shows_exactly_the_experts_of_the_table(tables):
    mask = ExpertTable("t", tables).to_mask(NUM_EXPERTS, len(tables))
    for layer, table in enumerate(tables):
        assert_shows(mask, layer, np.tile(np.arange(NUM_EXPERTS), (mask.vocab_size, 1)) if table is None else table)
    assert RoutingMask.from_tensors(*mask.to_tensors()).digest == mask.digest


@given(
    tables=tables_of_layers(),
    name=st.sampled_from([*TENSOR_NAMES.values(), TENSOR]),
    parts=st.one_of(st.none(), st.lists(st.sampled_from(["*E", "ME", "E", "*-*E", "|M*E"]), min_size=4, max_size=4)),
)
def test_a_mask_is_read_back_from_its_table(tables, name, parts, tmp_path_factory):
    """The files hold other tensors, too, as checkpoints do, and the layers of hybrid models have numbers with gaps."""
    folder = tmp_path_factory.mktemp("round_trip")
    mask = ExpertTable("t", tables).to_mask(NUM_EXPERTS, len(tables))
    pattern = parts and "".join(parts[: len(tables)])
    positions = positions_of_layers(pattern, len(tables), [name])
    names = ExpertTable.of_mask(mask).save(folder / "t.safetensors", name, positions)
    written = load_file(folder / "t.safetensors")
    assert written.keys() == set(names)
    assert {tensor.dtype for tensor in written.values()} == {np.dtype(np.int32)}
    other = {
        name.format(layer=1).removesuffix("tid2eid") + "weight": np.zeros(3),
        "mtp.0.ffn.gate.tid2eid": np.zeros(3),
    }
    save_file(written | other, folder / "shard.safetensors")
    for file in ("t.safetensors", "shard.safetensors"):
        again = ExpertTable.read(f"{folder}/{file}", len(tables), pattern).to_mask(NUM_EXPERTS, len(tables))
        assert np.array_equal(again.row_of_id, mask.row_of_id)
        assert np.array_equal(again.visible_bits, mask.visible_bits)


def test_a_shared_table_is_written_for_each_layer_with_experts(tmp_path):
    recipe = MaskRecipe.from_preset("top-k-hash", NUM_EXPERTS, 2, assignment="uniform", frequent_visible_experts=3)
    mask = build_routing_mask(replace(recipe, shared_table=True), vocab_size=VOCAB_SIZE)
    pattern = "*-*E"
    positions = positions_of_layers(pattern, 2)
    (name,) = ExpertTable.of_mask(mask).save(tmp_path / "t", TENSOR_NAMES["tid2eid"], positions)
    assert name == "decoder.layers.3.mlp.router.tid2eid"
    assert_shows(mask, 0, load_file(tmp_path / "t")[name])
    without, table = ExpertTable.read(f"{tmp_path}/t", 2, pattern).experts
    assert without is None
    assert_shows(mask, 1, table)


@pytest.mark.parametrize(
    ("pattern", "num_layers", "positions", "of_deepseek"),
    [
        ("*E*E", 2, [1, 3], [0, 1]),
        ("*E|M*E", 2, [1, 4], [0, 1]),
        ("*-*E", 2, [None, 3], [None, 1]),
        ("*-*E", 1, [3], [1]),
        ("*E*E/*E", 3, [1, 3, None], [0, 1, None]),
        ("*-*E/*E/*-", 2, [3, None], [1, None]),
        ("*-*E/*E/*-", 4, [None, 3, None, None], [None, 1, None, None]),
        ("*E*E", 3, None, None),
    ],
)
def test_positions_of_layers(pattern, num_layers, positions, of_deepseek):
    if positions is None:
        with pytest.raises(UserError, match="2 E and 0 -, but the mask is for 3 layers"):
            positions_of_layers(pattern, num_layers)
    else:
        assert positions_of_layers(pattern, num_layers) == positions
        for format_, expected in (("tid2eid", positions), ("tid2eid-deepseek", of_deepseek)):
            assert positions_of_layers(pattern, num_layers, [TENSOR_NAMES[format_]]) == expected


@pytest.mark.parametrize(
    ("masses", "words"),
    [
        ([1.0, 0.3], r"in table 1 of the mask \d+ of 50 ids see another number than 3, such as id \d+; make"),
        ([None, None], "every id sees all experts in all layers"),
    ],
)
def test_refuses_masks_without_a_table(masses, words):
    tables = []
    for mass in masses:
        recipe = MaskRecipe.from_preset("smoe", NUM_EXPERTS, 1)
        if mass is not None:
            recipe = MaskRecipe(NUM_EXPERTS, 1, "balanced", mass, 3)
        mask = build_routing_mask(recipe, frequency=frequency_of(np.arange(VOCAB_SIZE) + 1))
        tables.append((mask.row_of_id[0].astype(np.int64), mask.visible_bits[0]))
    mask = RoutingMask(*stack_tables(tables, NUM_EXPERTS), VOCAB_SIZE, NUM_EXPERTS, 2, mask.provenance)
    with pytest.raises(UserError, match=words):
        ExpertTable.of_mask(mask)


def test_commands_write_and_read_a_table(tmp_path):
    """Rows beyond the vocabulary of the tokenizer are padding."""
    frequency_of(np.arange(VOCAB_SIZE) + 1).save(tmp_path / "counts")
    hashed = ["--preset", "smoe", "--hash-layers", 2, "--hash-visible-experts", 3]
    pattern = ["--hybrid-layer-pattern", "*E*E*E*E"]
    write = ["--token-frequency", "counts", *hashed, *pattern, "--force"]
    for form, first in (
        ("tid2eid", "decoder.layers.1.mlp.router.tid2eid"),
        ("mask", ""),
        ("tid2eid-deepseek", "layers.0."),
    ):
        process = build(*write, "--format", form, folder=tmp_path, output=form)
        assert process.code == 0, process.errors
        assert (f"2 tensors, the first is {first}" in process.output) == (form != "mask")
    mask = RoutingMask.load(tmp_path / "mask")
    tables = load_file(tmp_path / "tid2eid")
    assert list(tables) == ["decoder.layers.1.mlp.router.tid2eid", "decoder.layers.3.mlp.router.tid2eid"]
    save_file({name: np.pad(table, ((0, 14), (0, 0))) for name, table in tables.items()}, tmp_path / "t.safetensors")
    of_deepseek = load_file(tmp_path / "tid2eid-deepseek")
    assert list(of_deepseek) == ["layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"]
    save_file(of_deepseek, tmp_path / "d.safetensors")
    for file, size in (
        ("t", ["--token-frequency", "counts"]),
        ("t", ["--vocab-size", VOCAB_SIZE]),
        ("d", ["--token-frequency", "counts"]),
    ):
        table = ["--expert-table", f"{file}.safetensors"]
        process = build(*table, *size, *pattern, "--force", folder=tmp_path, output="again")
        assert process.code == 0, process.errors
        assert "in the first 2 layers, every id sees 3 of 12 experts; after that, every id sees all" in process.output
        assert ("expert load" in process.output) == (size[0] == "--token-frequency")
        again = RoutingMask.load(tmp_path / "again")
        for layer in range(NUM_LAYERS):
            assert np.array_equal(again.visible_sets(layer), mask.visible_sets(layer))
    too_many = build("--expert-table", "t.safetensors", "--vocab-size", 65, *pattern, folder=tmp_path, output="no")
    too_many.assert_refused("has 64 ids, but the tokenizer has 65")
    copy = ["--routing-mask", "mask", "--format", "tid2eid", *pattern, "--output", "copy"]
    assert run_command("mask", *copy, folder=tmp_path).code == 0
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "tid2eid").read_bytes()


def test_a_table_for_each_layer(tmp_path):
    tables = np.stack([random_table(layer) for layer in range(NUM_LAYERS)])
    save_file({"other": np.zeros(3), "experts": tables.astype(np.int32)}, tmp_path / "t.safetensors")
    mask = ExpertTable.read(f"{tmp_path}/t.safetensors:experts", NUM_LAYERS).to_mask(NUM_EXPERTS, NUM_LAYERS)
    for layer in range(NUM_LAYERS):
        assert_shows(mask, layer, tables[layer])
    with pytest.raises(UserError, match="4 layers, but the model has 5"):
        ExpertTable.read(f"{tmp_path}/t.safetensors:experts", NUM_LAYERS + 1)


def test_hash_layers_of_a_sharded_model(tmp_path):
    """As in DeepSeek-V4, the first layers have tables and the remaining layers route freely."""
    for layer in range(2):
        tensors = {TENSOR.format(layer=layer): random_table(layer), f"model.layers.{layer}.x": np.zeros(2, np.float32)}
        save_file(tensors, tmp_path / f"model-0000{layer + 1}-of-00002.safetensors")
    process = build("--expert-table", ".", folder=tmp_path)
    assert process.code == 0, process.errors
    mask = RoutingMask.load(tmp_path / "mask.safetensors")
    for layer in range(2):
        assert_shows(mask, layer, random_table(layer))
    assert mask.visible_sets(2).all()
    assert mask.visible_sets(3).all()


def test_routes_as_the_hash_router_of_deepseek():
    config = DeepseekV4Config(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_experts_per_tok=3, n_routed_experts=NUM_EXPERTS
    )
    config.num_local_experts = NUM_EXPERTS
    theirs = DeepseekV4HashRouter(config)
    theirs.tid2eid.copy_(torch.from_numpy(random_table(0)))
    ours = MaskMoETopKRouter(
        MaskMoEConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=3,
            scoring_func=config.scoring_func,
            norm_topk_prob=True,
            routed_scaling_factor=config.routed_scaling_factor,
        )
    )
    weight = torch.randn(NUM_EXPERTS, 16)
    theirs.weight.data.copy_(weight)
    ours.weight.data.copy_(weight)
    hidden, ids = torch.randn(100, 16), torch.randint(VOCAB_SIZE, (100,))
    mask = ExpertTable("t", (random_table(0),)).to_mask(NUM_EXPERTS, 1)
    _, weights, indices = ours(hidden, torch.from_numpy(mask.visible_sets(0))[ids])
    _, their_weights, their_indices = theirs(hidden, ids)
    dense, their_dense = (
        torch.zeros(100, NUM_EXPERTS).scatter(1, chosen, weights)
        for chosen, weights in ((indices, weights), (their_indices, their_weights))
    )
    torch.testing.assert_close(dense, their_dense)


BAD_TABLES = """
    missing.npy text.npy objects.npy archive.npy text.safetensors floats.npy flat.npy outside.npy negative.npy twice.npy
    two.safetensors two.safetensors:c different.safetensors missing.safetensors doubled.safetensors beyond.safetensors
"""


@pytest.mark.parametrize("location", BAD_TABLES.split())
def test_refuses_bad_input(location, tmp_path):
    fine = random_table(0)
    outside, negative = fine.copy(), fine.copy()
    outside[4, 2], negative[4, 2] = NUM_EXPERTS, -1
    twice = fine.copy()
    twice[[4, 7], 1] = twice[[4, 7], 0]
    tables = {"floats": fine * 1.0, "flat": fine[:, 0], "outside": outside, "negative": negative, "twice": twice}
    for name, table in {**tables, "objects": np.array([{}], dtype=object)}.items():
        np.save(tmp_path / f"{name}.npy", table)
    with open(tmp_path / "archive.npy", "wb") as archive:
        np.savez(archive, fine)
    for name in ("text.npy", "text.safetensors"):
        (tmp_path / name).write_text("text")
    save_file({"a": fine, "b": fine}, tmp_path / "two.safetensors")
    save_file({TENSOR.format(layer=layer): fine for layer in (0, 2)}, tmp_path / "missing.safetensors")
    save_file({TENSOR.format(layer=layer): fine for layer in range(5)}, tmp_path / "beyond.safetensors")
    save_file({name.format(layer=0): fine for name in TENSOR_NAMES.values()}, tmp_path / "doubled.safetensors")
    tables = {TENSOR.format(layer=layer): fine[layer:] for layer in range(2)}
    save_file(tables, tmp_path / "different.safetensors")
    with pytest.raises(UserError):
        ExpertTable.read(f"{tmp_path}/{location}", NUM_LAYERS).to_mask(NUM_EXPERTS, NUM_LAYERS)
