"""Checkpoints of hybrid models convert like those of their GPT twins, in both directions."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.converted_models import VOCAB_SIZE, save_model, to_megatron
from support.small_moe import make_mask, random_visible_sets
from support.tensors import assert_same_tensors, tensors_of

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.conversion.config_mapping import gpt_args
from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface, upcycle_model
from maskmoe.conversion.settings import Settings, UpcycleSettings
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

pytestmark = pytest.mark.usefixtures("one_rank")


def assert_same_checkpoints(first: Path, second: Path) -> None:
    """Check that the checkpoints `release` in two folders have the same tensors."""
    assert_same_tensors(tensors_of(first / "release"), tensors_of(second / "release"))


def args_of(folder: Path) -> Namespace:
    return read_common_state(folder / "release")["args"]


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory) -> Path:
    """A model with a dense layer between two layers with experts, in transformers' format of another family."""
    folder = tmp_path_factory.mktemp("hybrid") / "qwen2_moe"
    save_model("qwen2_moe", folder)
    return folder


def test_the_class_of_the_model_is_kept(moe_model, tmp_path):
    to_megatron(moe_model, tmp_path / "hybrid")
    args = args_of(tmp_path / "hybrid")
    assert (args.hybrid_layer_pattern, args.moe_layer_freq) == ("*E*-*E", 1)
    megatron_to_huggingface(Settings(load=tmp_path / "hybrid", save=tmp_path / "hf"))
    huggingface_to_megatron(Settings(load=tmp_path / "hf", save=tmp_path / "same"))
    assert vars(args_of(tmp_path / "same")) == vars(args_of(tmp_path / "hybrid"))
    assert_same_checkpoints(tmp_path / "same", tmp_path / "hybrid")
    # A hybrid model also if the configuration has changed since.
    (tmp_path / "hf/integrity.json").unlink()
    config = tmp_path / "hf/config.json"
    original = config.read_text()
    config.write_text(original.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
    huggingface_to_megatron(Settings(load=tmp_path / "hf", save=tmp_path / "changed"))
    changed = args_of(tmp_path / "changed")
    assert (changed.hybrid_layer_pattern, changed.moe_router_topk) == ("*E*-*E", 1)
    # A GPT model, whose export is the same.
    config.write_text(original)
    record = tmp_path / "hf/megatron/args.json"
    gpt = {"hybrid_layer_pattern": None, "num_layers": 3, "moe_layer_freq": [1, 0, 1]}
    record.write_text(json.dumps(json.loads(record.read_text()) | gpt))
    huggingface_to_megatron(Settings(load=tmp_path / "hf", save=tmp_path / "gpt"))
    assert vars(args_of(tmp_path / "gpt")).items() >= gpt.items()
    megatron_to_huggingface(Settings(load=tmp_path / "gpt", save=tmp_path / "hf_of_gpt"))
    files = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf_of_gpt"))
    assert_same_tensors(*files)


@pytest.mark.parametrize("pattern", ["*EGE", "*E|M*|GE", "+E|D-", "**EE", "*E--", "*-*E/*-", "*E*E/*E*E", "/*E"])
def test_layers_that_transformers_does_not_have(pattern):
    with pytest.raises(UserError, match="--hybrid-layer-pattern"):
        gpt_args(Namespace(hybrid_layer_pattern=pattern, num_experts=4))


def test_upcycling_to_a_hybrid_model(tmp_path):
    """A hybrid model becomes a hybrid model with experts, also on the way through transformers' format."""
    save_model("llama", tmp_path / "dense")
    to_megatron(tmp_path / "dense", tmp_path / "hybrid")
    mask = make_mask(random_visible_sets(0, 2, VOCAB_SIZE, 4))
    recipe = UpcycleSettings(4, topk=3, moe_layer_freq=[0, 1, 1])
    settings = Settings(load=tmp_path / "hybrid", save=tmp_path / "out")
    upcycle_model(settings, recipe, mask, to_megatron=True)
    assert args_of(settings.save).hybrid_layer_pattern == "*-*E*E"
    upcycle_model(replace(settings, save=tmp_path / "hf"), recipe, mask, to_megatron=False)
    huggingface_to_megatron(Settings(load=tmp_path / "hf", save=tmp_path / "again"))
    assert_same_checkpoints(settings.save, tmp_path / "again")


@given(layers=st.lists(st.booleans(), min_size=1, max_size=6), depth=st.integers(0, 3))
def test_transformers_reads_the_table_that_training_reads(layers, depth):
    """A mask can have a table for each layer, or for each layer with experts only."""
    of_training = FeedForwardLayers(tuple(layers), (layers[-1],) * depth)
    if not any(layers):
        return
    kinds = ["sparse" if experts else "dense" for experts in layers]
    for num_tables in (1, of_training.num_moe_layers, len(of_training.has_experts)):
        config = MaskMoEConfig(
            num_experts=4,
            num_hidden_layers=len(layers),
            mlp_layer_types=kinds,
            num_nextn_predict_layers=depth,
            routing_mask={"num_tables": num_tables, "num_rows": 5, "row_dtype": "int16", "metadata_bytes": 0},
        )
        for layer in (layer for layer, experts in enumerate(of_training.has_experts) if experts):
            assert config.routing_table(layer) == of_training.table(layer + 1, num_tables)
