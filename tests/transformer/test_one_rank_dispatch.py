"""Dispatch within one rank of a CPU against Megatron's all-to-all dispatcher, bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from support.small_moe import (
    DEVICE,
    draw_parameters,
    make_config,
    make_layer,
    make_mask,
    process_groups,
    random_visible_sets,
)
from torch import Tensor

from maskmoe.megatron_compat import cpu
from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.kind import DispatchKind
from maskmoe.transformer.dispatch.one_copy import OneRankDispatcher
from maskmoe.transformer.dispatch.stock import StockDispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer

on_cpu = pytest.mark.skipif(not cpu.is_installed(), reason="GPUs use Megatron's dispatcher")

GROUPS = SimpleNamespace(ep=SimpleNamespace(size=lambda: 1), expt_tp=SimpleNamespace(size=lambda: 1))


def compute(layer: MaskMoELayer, hidden: Tensor, token_ids: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Return the output, all gradients and the routing statistics of a layer."""
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden, padding_mask=token_ids)
    output.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    packed, most_rows = layer.router.statistics.take()
    counted = {"statistics": packed, "most rows": torch.tensor(most_rows)}
    return {"output": output.detach(), "hidden": hidden.grad} | gradients | counted


@on_cpu
@pytest.mark.parametrize("settings", [{}, {"moe_latent_size": 6}, {"params_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize(("topk", "sizes"), [(1, (1, 4)), (1, (4,)), (2, (1, 4)), (2, (2, 6)), (4, (1, 3, 6))])
def test_layer_is_bit_equal_to_one_with_megatrons_dispatcher(topk: int, sizes: tuple[int, ...], settings: dict) -> None:
    config = make_config(6, topk, **settings)
    layer = make_layer(config, make_mask(random_visible_sets(2, 1, 30, 6, sizes)))
    draw_parameters(layer)
    assert type(layer.dispatcher) is OneRankDispatcher
    hidden, gradient = torch.randn(2, 11, 3, 8, device=DEVICE).to(config.params_dtype)
    token_ids = torch.randint(0, 30, (3, 11), device=DEVICE)
    found = compute(layer, hidden, token_ids, gradient)
    layer.dispatcher = StockDispatcher(layer, process_groups())
    expected = compute(layer, hidden, token_ids, gradient)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert expected["hidden"].any()


@on_cpu
def test_micro_batches_in_flight_do_not_share_memory() -> None:
    layer = make_layer(make_config(4, 1), make_mask(random_visible_sets(0, 1, 30, 4)))
    draw_parameters(layer)
    inputs = torch.randn(2, 5, 2, 8, device=DEVICE)
    token_ids = torch.randint(0, 30, (2, 5), device=DEVICE)
    alone = [layer(hidden, padding_mask=token_ids)[0].clone() for hidden in inputs]
    together = [layer(hidden, padding_mask=token_ids)[0] for hidden in inputs]
    assert all(map(torch.equal, together, alone))


@on_cpu
def test_dropped_tokens_need_megatrons_dispatcher() -> None:
    assert choose_dispatch(make_config(4), GROUPS, is_rank_local=True) is DispatchKind.ONE_RANK
    dropping = make_config(4, moe_expert_capacity_factor=1.0)
    assert choose_dispatch(dropping, GROUPS, is_rank_local=True) is DispatchKind.STOCK


def test_gpus_use_megatrons_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(4)
    monkeypatch.setattr(cpu, "is_installed", lambda: False)
    assert choose_dispatch(config, GROUPS, is_rank_local=True) is DispatchKind.STOCK
