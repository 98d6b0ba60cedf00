"""Upcycled models compute what the dense model computes if they say so, and are the same in blocks of any size."""

import pytest
import torch
from support.converted_models import (
    VOCAB_SIZE,
    add_multi_token_prediction,
    in_transformers,
    logits_of,
    random_ids,
    save_model,
)

from maskmoe.conversion.families import open_huggingface
from maskmoe.conversion.model_tensors import OpenedModel
from maskmoe.conversion.settings import UpcycleSettings
from maskmoe.conversion.tensor_sources import Block, TensorSource
from maskmoe.conversion.upcycle import changes_of_function, upcycle
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import RoutingMask

# Weights add up to 1 only up to rounding in fp32. The largest difference seen is 4e-6, for logits of about 5 in
# magnitude.
ROUNDING = 2e-5
LAYERS = 3


def mask_of(num_experts: int, preset: str = "smoe", **settings) -> RoutingMask:
    recipe = MaskRecipe.from_preset(preset, num_experts, LAYERS, **settings)
    return build_routing_mask(recipe, vocab_size=VOCAB_SIZE)


def read(source: TensorSource, name: str) -> torch.Tensor:
    return source.read(Block.whole(name, source.tensors[name].shape))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> OpenedModel:
    folder = tmp_path_factory.mktemp("dense")
    save_model("llama", folder)
    return open_huggingface(folder)


@pytest.fixture(scope="module")
def dense_logits(dense) -> torch.Tensor:
    return logits_of(in_transformers(dense), random_ids())


PRESERVING = {
    "k = 2": (UpcycleSettings(6), mask_of(6)),
    "k = 3, some layers": (UpcycleSettings(8, topk=3, moe_layer_freq=[0, 1, 1]), mask_of(8)),
    "k = 1, V = 1": (UpcycleSettings(6, topk=1), mask_of(6, "hash")),
    "k = 3, V = 2": (UpcycleSettings(6, topk=3), mask_of(6, "top-k-hash", frequent_visible_experts=2)),
    "shared expert": (UpcycleSettings(4, shared_expert=True), mask_of(4)),
    "quarter experts, shared expert": (UpcycleSettings(16, 8, granularity=4, shared_expert=True), mask_of(16)),
}


@pytest.mark.parametrize("case", PRESERVING)
def test_preserves_the_function(case, dense, dense_logits):
    settings, mask = PRESERVING[case]
    assert changes_of_function(settings, mask) == []
    model = in_transformers(upcycle(dense, settings, mask))
    torch.testing.assert_close(logits_of(model, random_ids()), dense_logits, atol=ROUNDING, rtol=0)
    assert model.config.router_aux_loss_coef == MaskMoEConfig.router_aux_loss_coef  # that of a dense model is 0


CHANGING = {
    "K = 1": (UpcycleSettings(6, topk=1), mask_of(6)),
    "a part of the 2 experts": (UpcycleSettings(6, granularity=2), mask_of(6, "hash")),
}


@pytest.mark.parametrize("words", CHANGING)
def test_says_why_the_function_changes(words, dense, dense_logits):
    settings, mask = CHANGING[words]
    (reason,) = changes_of_function(settings, mask)
    assert words in reason
    model = in_transformers(upcycle(dense, settings, mask))
    assert (logits_of(model, random_ids()) - dense_logits).abs().max() > 1e-2


def test_multi_token_prediction_gets_experts_of_its_own_mlp(tmp_path):
    save_model("deepseek_v3, dense", tmp_path)
    layer = add_multi_token_prediction(tmp_path)
    dense = open_huggingface(tmp_path)
    recipe = MaskRecipe.from_preset("hash", 4, LAYERS + 1)
    upcycled = upcycle(dense, UpcycleSettings(4), build_routing_mask(recipe, vocab_size=VOCAB_SIZE))
    model = in_transformers(upcycled)
    ids = random_ids()
    torch.testing.assert_close(logits_of(model, ids), logits_of(in_transformers(dense), ids), atol=ROUNDING, rtol=0)
    experts = read(upcycled.source, f"model.layers.{LAYERS}.mlp.experts.down_proj")
    assert torch.equal(experts, layer[f"model.layers.{LAYERS}.mlp.down_proj.weight"].expand(4, -1, -1))
    with pytest.raises(UserError, match="it is for 3 MoE layers, the model has 4"):
        upcycle(dense, UpcycleSettings(4), mask_of(4, "hash"))


def test_routers_are_drawn_from_a_normal_distribution(dense):
    upcycled = upcycle(dense, UpcycleSettings(512), mask_of(512)).source
    routers = [read(upcycled, f"model.layers.{layer}.mlp.gate.weight") for layer in range(LAYERS)]
    assert not torch.equal(routers[0], routers[1])
    for router in routers:
        assert router.std().item() == pytest.approx(dense.config["initializer_range"], rel=0.02)
        assert router.mean().abs() < 1e-3


def test_describes_the_model(dense):
    config = upcycle(dense, UpcycleSettings(8, granularity=2, moe_layer_freq=2), mask_of(8)).config
    assert config["mlp_layer_types"] == ["sparse", "dense", "sparse"]
    assert (config["moe_intermediate_size"], config["routed_scaling_factor"]) == (24, 2.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 4, "topk": 5}, "5 of 4 experts"),
        ({"num_experts": 4, "moe_layer_freq": [1, 0]}, "mlp_layer_types must name 3 layers"),
        ({"num_experts": 4, "moe_layer_freq": [0, 0, 0]}, "--moe-layer-freq"),
        ({"num_experts": 8}, "number of experts is 4"),
        ({"num_experts": 6, "granularity": 4, "topk": 4}, "--granularity"),
        ({"num_experts": 35, "topk": 35, "granularity": 5}, "intermediate_size 48"),
    ],
)
def test_refuses_settings(settings, words, dense):
    with pytest.raises(UserError, match=words):
        upcycle(dense, UpcycleSettings(**settings), mask_of(4))
