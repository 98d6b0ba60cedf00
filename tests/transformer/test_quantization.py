"""Experts of Transformer Engine: rows are padded for FP8 and FP4, and their numbers can stay on the device."""

import os
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP
from support.launchers import RunRanks
from support.small_moe import (
    draw_parameters,
    initialize_parallelism,
    make_config,
    make_layer,
    make_mask,
    plan_ids,
    visible_halves,
)
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.transformer.experts import CountsOnDeviceMLP
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN, TOPK = 4, 8, 6, 2, 8, 2
DISPATCHERS = {"all_ranks": "OneCopyDispatcher", "rank_local": "PlannedDispatcher"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp4": {"fp4": "e2m1"},
}
RECOMPUTATION = {"none": {}, "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}}


def train(mask: str, settings: dict[str, Any], on_device: bool = False) -> tuple[str, dict[str, Tensor], list[str]]:
    """Run a layer forward and backward; return the dispatcher, output and gradients, and Transformer Engine's calls.

    All visible experts of an id are on both ranks, or `rank_local`. `on_device`: Transformer Engine wants the numbers
    of rows on the device.
    """
    from support import stub_transformer_engine

    rank = torch.distributed.get_rank()
    visible = visible_halves(VOCAB_SIZE, NUM_EXPERTS) | (mask == "all_ranks")
    engine = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, "expert_model_parallel_size": 2}
    config = make_config(NUM_EXPERTS, TOPK, **engine, **settings)
    if on_device:
        config.gradient_accumulation_fusion = True  # for the layer's choice alone
    with patch.dict(os.environ, {"NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM": str(int(on_device))}):
        layer = make_layer(config, make_mask(visible))
    draw_parameters(layer)
    generator = torch.Generator().manual_seed(rank)
    ids = TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator))
    hidden, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator)
    if mask == "rank_local":
        ids = plan_ids(layer, ids)
    stub_transformer_engine.CALLS.clear()
    output = layer(hidden.requires_grad_(), padding_mask=pack_token_ids(ids))[0]
    output.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    tensors = {"output": output.detach(), "input": hidden.grad, **gradients}
    return type(layer.dispatcher).__name__, tensors, list(stub_transformer_engine.CALLS)


def train_all() -> dict[tuple[str, str, str], tuple[str, dict[str, Tensor], list[str]]]:
    initialize_parallelism(expert_model_parallel_size=2)
    results = {
        (mask, precision, recomputed): train(mask, settings | recomputation)
        for mask in DISPATCHERS
        for precision, settings in PRECISIONS.items()
        for recomputed, recomputation in RECOMPUTATION.items()
    }
    for mask in DISPATCHERS:
        for precision, settings in PRECISIONS.items():
            results[mask, precision, "on device"] = train(mask, settings, on_device=True)
    return results


@pytest.fixture(scope="module")
def ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(train_all, tmp_path_factory.mktemp("quantization"), transformer_engine="stub")


@pytest.mark.parametrize("mask", DISPATCHERS)
@pytest.mark.parametrize("precision", ["fp8", "fp4"])
@pytest.mark.parametrize("recomputed", RECOMPUTATION)
def test_padded_experts_compute_the_same(mask: str, precision: str, recomputed: str, ranks: list[dict]) -> None:
    for results in ranks:
        dispatcher, expected, calls = results[mask, "bf16", recomputed]
        assert dispatcher == DISPATCHERS[mask]
        assert calls == []
        # Rows and weights of rows are padded, and outputs unpadded.
        passes = ["pad", "pad", "unpad"]
        dispatcher, found, calls = results[mask, precision, recomputed]
        assert dispatcher == DISPATCHERS[mask]
        assert calls == (passes if recomputed == "none" else ["checkpoint", *passes, *passes])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", DISPATCHERS)
def test_numbers_of_rows_stay_on_the_device(mask: str, ranks: list[dict]) -> None:
    for results in ranks:
        _, expected, _ = results[mask, "bf16", "none"]
        _, found, calls = results[mask, "bf16", "on device"]
        assert calls == 2 * ["rows on the device"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        # Padding needs the numbers on the host.
        assert "rows on the device" not in results[mask, "fp8", "on device"][2]


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("fuses", [False, True])
def test_layers_that_cannot_ignore_the_variable(
    is_old: bool, is_set: bool, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before version 2.19, Transformer Engine reads the variable in each forward pass."""

    def build(experts: TEGroupedMLP) -> None:
        torch.nn.Module.__init__(experts)
        experts.linear_fc1, experts.linear_fc2 = torch.nn.Identity(), torch.nn.Identity()
        experts.config = make_config(NUM_EXPERTS)
        experts.config.gradient_accumulation_fusion = fuses
        for layer in () if is_old else (experts.linear_fc1, experts.linear_fc2):
            layer.use_grouped_tensor = is_set

    monkeypatch.setattr(TEGroupedMLP, "__init__", build)
    monkeypatch.setenv("NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM", str(int(is_set)))
    is_refused = is_old and is_set and not fuses
    with pytest.raises(UserError, match=r"Transformer Engine 2\.19") if is_refused else nullcontext():
        layer = CountsOnDeviceMLP().linear_fc1
        assert is_old or layer.use_grouped_tensor is (is_set and fuses)
