"""Experts of Transformer Engine on two ranks: FP8 padding, row counts on the device, deferred gradients.

The stub of Transformer Engine computes in plain torch, so every case must give the gradients of the plain case.
"""

import os
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.experts import TEGroupedMLP
from support import small_moe as moe
from support.launchers import RunRanks
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.transformer.experts import CountsOnDeviceMLP
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN, TOPK = 4, 8, 6, 2, 8, 2
ON_DEVICE = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
PADDED = ["pad", "pad", "unpad"]  # rows and weights of rows are padded, and outputs unpadded
# Settings, and the calls of Transformer Engine that the case makes.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bf16": ({}, []),
    "fp8": (FP8, PADDED),
    "fp4, recomputed": ({"fp4": "e2m1", **RECOMPUTED}, ["checkpoint", *PADDED, *PADDED]),
    "on device": ({}, 2 * ["rows on the device"]),
    "fp8, on device": (FP8, PADDED),  # padding needs the counts on the host
    "deferred": ({"overlap_dispatch_backward_with_experts_wgrad": True}, []),
}
DISPATCHERS = {"all_ranks": "OneCopyDispatcher", "rank_local": "PlannedDispatcher"}


def build_layer(mask: str, case: str, **settings: Any) -> MaskMoELayer:
    """Build a layer whose ids see experts of all ranks or, `rank_local`, of one rank."""
    visible = moe.visible_halves(VOCAB_SIZE, NUM_EXPERTS) | (mask == "all_ranks")
    engine = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, "expert_model_parallel_size": 2}
    config = moe.make_config(NUM_EXPERTS, TOPK, **engine, **CASES[case][0], **settings)
    if "on device" in case:
        config.gradient_accumulation_fusion = True  # for the layer's choice alone
    with patch.dict(os.environ, {ON_DEVICE: str(int("on device" in case))}):
        layer = moe.make_layer(config, moe.make_mask(visible))
    moe.draw_parameters(layer)
    return layer


def run(layer: MaskMoELayer, call: torch.nn.Module, seed: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """Run forward and backward on one batch of this rank; return the results and Transformer Engine's calls."""
    from support import stub_transformer_engine

    generator = torch.Generator().manual_seed(10 * seed + torch.distributed.get_rank())
    ids = TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator))
    if layer.router.visible_experts.is_rank_local:
        ids = moe.plan_ids(layer, ids)
    hidden, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator)
    stub_transformer_engine.CALLS.clear()
    output = call(hidden.requires_grad_(), padding_mask=pack_token_ids(ids))[0]
    output.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "input": hidden.grad, **gradients}, list(stub_transformer_engine.CALLS)


def gradients_of_data_parallelism(case: str) -> dict[str, Tensor]:
    """Return the gradients that the optimizer sees after two micro-batches of the second step."""
    layer = build_layer("all_ranks", case, gradient_accumulation_fusion=True)
    ddp = DistributedDataParallel(layer.config, DistributedDataParallelConfig(overlap_grad_reduce=False), layer)
    for step in range(2):
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            run(layer, ddp, 2 * step)
        run(layer, ddp, 2 * step + 1)
        ddp.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in layer.experts.named_parameters()}


def compare_on_rank() -> None:
    moe.initialize_parallelism(expert_model_parallel_size=2)
    for mask, dispatcher in DISPATCHERS.items():
        plain = build_layer(mask, "bf16")
        expected, _ = run(plain, plain)
        for case, (_, expected_calls) in CASES.items():
            layer = build_layer(mask, case)
            assert type(layer.dispatcher).__name__ == ("StockDispatcher" if case == "deferred" else dispatcher)
            found, calls = run(layer, layer)
            assert calls == expected_calls, case
            if case == "deferred":  # with a plan, the plain layer's router runs on the ranks of the experts
                found["router.weight"] = expected["router.weight"]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (gradients_of_data_parallelism(case) for case in ("deferred", "bf16"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_way_to_compute_gives_the_same_gradients(run_ranks: RunRanks, tmp_path) -> None:
    run_ranks(compare_on_rank, tmp_path, transformer_engine="stub")


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
        experts.config = moe.make_config(NUM_EXPERTS)
        experts.config.gradient_accumulation_fusion = fuses
        for layer in () if is_old else (experts.linear_fc1, experts.linear_fc2):
            layer.use_grouped_tensor = is_set

    monkeypatch.setattr(TEGroupedMLP, "__init__", build)
    monkeypatch.setenv(ON_DEVICE, str(int(is_set)))
    is_refused = is_old and is_set and not fuses
    with pytest.raises(UserError, match=r"Transformer Engine 2\.19") if is_refused else nullcontext():
        layer = CountsOnDeviceMLP().linear_fc1
        assert is_old or layer.use_grouped_tensor is (is_set and fuses)
