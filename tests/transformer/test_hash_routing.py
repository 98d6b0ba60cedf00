"""Layers with V = k visible experts against Megatron-Core's own hash layers, where the installed version has them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from support.hybrid_twins import ARGUMENTS, NUM_EXPERTS, SEQUENCE, VOCAB_SIZE, Twins
from support.small_moe import DEVICE, draw_parameters, make_mask, process_groups, random_visible_sets, take_metrics
from torch import Tensor

from maskmoe.transformer.layer_specs import get_maskmoe_hybrid_stack_spec, map_spec
from maskmoe.transformer.moe_layer import MaskMoELayer

pytestmark = pytest.mark.skipif(
    not hasattr(TransformerConfig, "moe_n_hash_layers"), reason="Megatron-Core without hash routing"
)
PATTERN, NUM_HASH_SYMBOLS, TOPK = "*E*E*E", 4, 2
"""The first two of three MoE layers are hash layers."""
VISIBLE = np.concatenate(
    [
        random_visible_sets(8, 2, VOCAB_SIZE, NUM_EXPERTS, sizes=(TOPK,)),
        np.ones((1, VOCAB_SIZE, NUM_EXPERTS), bool),
    ]
)


def stock_model(settings: dict[str, Any]) -> HybridModel:
    """Build Megatron's model with hash layers that use the tables of `VISIBLE`; attention and norms are in torch."""
    hashing = {"moe_n_hash_layers": NUM_HASH_SYMBOLS, "actual_vocab_size": VOCAB_SIZE}
    twins = Twins(PATTERN, settings | hashing, mask=make_mask(VISIBLE))
    config = twins._config(num_layers=len(PATTERN), is_hybrid_model=True)

    def to_stock(node: Any) -> Any:
        if isinstance(node, MoESubmodules):
            return replace(node, router=TopKRouter)
        return MoELayer if node is MaskMoELayer else node

    model = HybridModel(
        config,
        hybrid_stack_spec=map_spec(get_maskmoe_hybrid_stack_spec(config, twins._visible_experts(config)), to_stock),
        hybrid_layer_pattern=PATTERN,
        pg_collection=process_groups(),
        **ARGUMENTS,
    ).to(DEVICE)
    routers = [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
    for router, visible in zip(routers, VISIBLE[:2], strict=False):
        assert router.is_hash_layer
        router.tid2eid = torch.from_numpy(np.nonzero(visible)[1].reshape(VOCAB_SIZE, TOPK)).int().to(DEVICE)
    assert not routers[2].is_hash_layer
    return model


def losses_and_gradients(model: torch.nn.Module) -> list[Tensor]:
    """Run two micro-batches and return the losses of their tokens, and the gradients of the parameters in order."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(2, -1)
    losses = []
    for _ in range(2):
        ids = torch.randint(0, VOCAB_SIZE, (2, SEQUENCE), generator=generator).to(DEVICE)
        losses.append(model(ids, positions, None, labels=ids.roll(-1, dims=1)))
    torch.stack(losses).mean().backward()
    take_metrics()
    return [*losses, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
def test_the_same_table_gives_the_same_losses(score_function: str, recompute: bool) -> None:
    """Experts are equal; losses and gradients are equal up to the order in which fp32 sums are computed."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    settings = {
        "moe_aux_loss_coeff": 0,
        "moe_z_loss_coeff": None,
        "moe_router_score_function": score_function,
        **(full if recompute else {}),
    }
    stock, ours = stock_model(settings), Twins(PATTERN, settings, mask=make_mask(VISIBLE)).hybrid()
    draw_parameters(stock)
    parameters = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(parameters.pop(name))
    assert not parameters
    for found, expected in zip(losses_and_gradients(ours), losses_and_gradients(stock), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
