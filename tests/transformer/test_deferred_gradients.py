"""Experts that defer their weights' gradients, as Transformer Engine's do, are trained by two real ranks."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
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

from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN, TOPK = 4, 8, 6, 2, 8, 2
MASKS = ("all_ranks", "rank_local")
WAYS = ("computed", "deferred")


def build_layer(mask: str, way: str, **settings) -> MaskMoELayer:
    """Build a layer in one of `WAYS`: experts compute all gradients in the backward pass, or defer some."""
    config = make_config(
        NUM_EXPERTS,
        TOPK,
        expert_model_parallel_size=2,
        transformer_impl="transformer_engine",
        moe_grouped_gemm=True,
        **settings,
        overlap_dispatch_backward_with_experts_wgrad=way == "deferred",
    )
    layer = make_layer(config, make_mask(visible_halves(VOCAB_SIZE, NUM_EXPERTS) | (mask == "all_ranks")))
    draw_parameters(layer)
    return layer


def run_backward(layer: MaskMoELayer, call: torch.nn.Module, rank: int, seed: int = 0) -> Tensor:
    """Run forward and backward on one batch of this rank; return the gradient of the input."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    ids = TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator))
    if layer.router.visible_experts.is_rank_local:
        ids = plan_ids(layer, ids)
    hidden, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator)
    call(hidden.requires_grad_(), padding_mask=pack_token_ids(ids))[0].backward(gradient)
    return hidden.grad


def gradients_alone(mask: str, way: str, rank: int) -> dict[str, Tensor | str]:
    """Return the results of a layer without data parallelism."""
    layer = build_layer(mask, way)
    input_grad = run_backward(layer, layer, rank)
    of_experts = {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
    return {"dispatcher": type(layer.dispatcher).__name__, "input": input_grad, **of_experts}


def gradients_of_data_parallelism(way: str, rank: int) -> dict[str, Tensor]:
    """Return the gradients that the optimizer sees after two micro-batches of the second step."""
    layer = build_layer("all_ranks", way, gradient_accumulation_fusion=True)
    ddp = DistributedDataParallel(layer.config, DistributedDataParallelConfig(overlap_grad_reduce=False), layer)
    for step in range(2):
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            run_backward(layer, ddp, rank, 2 * step)
        run_backward(layer, ddp, rank, 2 * step + 1)
        ddp.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in layer.experts.named_parameters()}


def gradients_of_rank() -> dict[object, dict[str, Tensor | str]]:
    """Return the kind of dispatch, and the gradients of the experts and of the input, by case."""
    initialize_parallelism(expert_model_parallel_size=2)
    rank = torch.distributed.get_rank()
    results = {(mask, way): gradients_alone(mask, way, rank) for mask in MASKS for way in WAYS}
    return results | {way: gradients_of_data_parallelism(way, rank) for way in WAYS}


@pytest.fixture(scope="module")
def ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("deferred_gradients")
    return run_ranks(gradients_of_rank, folder, transformer_engine="stub")


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare up to rounding: dispatch of another kind adds up the copies of a token in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_deferred_gradients_equal_gradients_of_the_backward_pass(mask: str, ranks: list[dict]) -> None:
    for results in ranks:
        computed, deferred = dict(results[mask, "computed"]), dict(results[mask, "deferred"])
        assert computed.pop("dispatcher") in ("OneCopyDispatcher", "PlannedDispatcher")
        assert deferred.pop("dispatcher") == "StockDispatcher"
        assert_equal_gradients(deferred, computed)


def test_data_parallelism_sees_deferred_gradients(ranks: list[dict]) -> None:
    """The optimizer reads `main_grad`. Other combinations of settings are refused, see `test_refused_settings`."""
    for results in ranks:
        assert_equal_gradients(results["deferred"], results["computed"])
