"""Turns tables of experts into masks with V = k."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from support.command_lines import Outcome, run_command
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.huggingface.modeling_maskmoe import MaskMoETopKRouter
from maskmoe.routing_mask.expert_table import ExpertTable
from maskmoe.routing_mask.mask import RoutingMask

VOCAB_SIZE, NUM_EXPERTS, NUM_LAYERS = 50, 12, 4
TENSOR = "model.layers.{layer}.mlp.gate.tid2eid"


def random_table(seed: int, k: int = 3, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Return a table [vocab, k] without repeats."""
    order = np.random.default_rng(seed).random((vocab_size, NUM_EXPERTS)).argsort(axis=1)
    return np.ascontiguousarray(order[:, :k])  # safetensors ignores strides


def assert_shows(mask: RoutingMask, layer: int, table: np.ndarray) -> None:
    sets = mask.visible_sets(layer)
    assert [set(np.flatnonzero(row)) for row in sets] == [set(row) for row in table.tolist()]


def build(*arguments: object, folder: Path) -> Outcome:
    model = ["--num-experts", NUM_EXPERTS, "--num-layers", NUM_LAYERS, "--output", "mask.safetensors"]
    return run_command("mask", *model, *arguments, folder=folder)


@given(
    tables=st.integers(1, 3).flatmap(
        lambda layers: st.tuples(st.integers(1, 20), st.integers(1, 5)).flatmap(
            lambda shape: arrays(np.int64, (layers, *shape), elements=st.integers(0, NUM_EXPERTS - 1))
        )
    )
)
def test_shows_exactly_the_experts_of_the_table(tables):
    mask = ExpertTable("t", tuple(tables)).to_mask(NUM_EXPERTS, len(tables))
    for layer, table in enumerate(tables):
        assert_shows(mask, layer, table)
    assert RoutingMask.from_tensors(*mask.to_tensors()).digest == mask.digest


def test_one_table_serves_all_layers(tmp_path):
    table = random_table(0)
    table[[3, 7], 1] = table[[3, 7], 0]
    np.save(tmp_path / "t.npy", table.astype(np.int16))
    process = build("--expert-table", "t.npy", folder=tmp_path)
    assert "WARNING: 2 ids name an expert more than once" in process.output
    mask = RoutingMask.load(tmp_path / "mask.safetensors")
    assert mask.is_shared
    assert mask.num_layers == NUM_LAYERS
    assert_shows(mask, NUM_LAYERS - 1, table)
    assert mask.provenance.expert_table["name"] == "t.npy"


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
    process = build("--expert-table", f".:{TENSOR}", folder=tmp_path)
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


def test_provenance_has_a_digest_of_the_table(tmp_path):
    digests = set()
    for seed in (0, 0, 1):
        digests.add(ExpertTable("t", (random_table(seed),)).to_mask(NUM_EXPERTS, 1).provenance.expert_table["sha256"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("missing.npy", r"expert table .*missing.npy does not exist"),
        ("text.npy", r"text.npy is not a readable"),
        ("objects.npy", r"objects.npy is not a readable"),
        ("text.safetensors", r"text.safetensors is not a readable"),
        ("floats.npy", r"floats.npy must be integers .*float64"),
        ("flat.npy", r"flat.npy must be .*\[50\]"),
        ("outside.npy", r"id 4 the expert 12"),
        ("negative.npy", r"id 4 the expert -1"),
        ("two.safetensors", r"2 tensors; name one after a colon"),
        ("two.safetensors:c", r"no tensor c$"),
        ("two.safetensors:c.{layer}", r"no tensor c.0"),
        ("different.safetensors:t{layer}", r"one vocabulary.*\[49, 50\]"),
    ],
)
def test_refuses_bad_input(location, words, tmp_path):
    fine = random_table(0)
    outside, negative = fine.copy(), fine.copy()
    outside[4, 2], negative[4, 2] = NUM_EXPERTS, -1
    tables = {"floats": fine * 1.0, "flat": fine[:, 0], "outside": outside, "negative": negative}
    for name, table in {**tables, "objects": np.array([{}], dtype=object)}.items():
        np.save(tmp_path / f"{name}.npy", table)
    for name in ("text.npy", "text.safetensors"):
        (tmp_path / name).write_text("text")
    save_file({"a": fine, "b": fine}, tmp_path / "two.safetensors")
    save_file({"t0": fine, "t1": fine[1:]}, tmp_path / "different.safetensors")
    with pytest.raises(UserError, match=words):
        ExpertTable.read(f"{tmp_path}/{location}", NUM_LAYERS).to_mask(NUM_EXPERTS, NUM_LAYERS)
