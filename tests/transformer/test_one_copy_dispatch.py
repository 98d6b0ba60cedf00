"""Dispatch within one rank, and the choice of the way to dispatch."""

from types import SimpleNamespace

import pytest
import torch
from support import small_moe as moe
from support.small_moe import DEVICE
from support.tensors import assert_same_tensors
from torch import Tensor

from maskmoe.megatron_compat import cpu
from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.one_copy import OneRankDispatcher
from maskmoe.transformer.dispatch.stock import StockDispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer

on_cpu = pytest.mark.skipif(not cpu.is_installed(), reason="Megatron's dispatcher adds in a random order on GPUs")


def groups(expert_parallel: int = 2, expert_tensor_parallel: int = 1) -> SimpleNamespace:
    """Return a stand-in for a `ProcessGroupCollection` with the sizes that the choice reads."""
    sizes = {"ep": expert_parallel, "expt_tp": expert_tensor_parallel}
    return SimpleNamespace(**{name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()})


STOCK, ONE_COPY, PLANNED = DispatchKind.STOCK, DispatchKind.ONE_COPY, DispatchKind.PLANNED


@pytest.mark.parametrize(
    ("settings", "ranks", "kind_without_plan", "kind"),
    [
        ({}, {}, ONE_COPY, PLANNED),
        ({"moe_input_jitter_eps": 0.0}, {}, ONE_COPY, PLANNED),
        ({"moe_expert_capacity_factor": 1.0}, {}, ONE_COPY, ONE_COPY),
        ({"moe_input_jitter_eps": 0.1}, {}, ONE_COPY, ONE_COPY),
        ({"variable_seq_lengths": True}, {}, ONE_COPY, ONE_COPY),
        ({"moe_latent_size": 6}, {}, ONE_COPY, ONE_COPY),
        ({"moe_enable_routing_replay": True}, {}, ONE_COPY, ONE_COPY),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, {}, ONE_COPY, ONE_COPY),
        ({"topk": 1}, {}, STOCK, PLANNED),
        ({}, {"expert_parallel": 4}, STOCK, PLANNED),  # one expert on each rank
        # Only Megatron's dispatchers support these settings.
        ({}, {"expert_tensor_parallel": 2}, STOCK, STOCK),
        ({"moe_token_dispatcher_type": "allgather"}, {}, STOCK, STOCK),
        ({"moe_token_dispatcher_type": "flex"}, {}, STOCK, STOCK),
        ({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}, {}, STOCK, STOCK),
        ({"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True}, {}, STOCK, STOCK),
        ({}, {"expert_parallel": 1}, DispatchKind.ONE_RANK, DispatchKind.ONE_RANK),
        ({"moe_expert_capacity_factor": 1.0}, {"expert_parallel": 1}, STOCK, STOCK),
    ],
    ids=str,
)
def test_kind_of_dispatch(settings, ranks, kind_without_plan, kind) -> None:
    config, pg_collection = moe.make_config(4, **settings), groups(**ranks)
    assert choose_dispatch(config, pg_collection, is_rank_local=False) is kind_without_plan
    assert choose_dispatch(config, pg_collection, is_rank_local=True) is kind
    # The ids of multi-token prediction have no plan.
    assert choose_dispatch(config, pg_collection, is_rank_local=True, is_mtp_layer=True) is kind_without_plan


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
    config = moe.make_config(6, topk, **settings)
    layer = moe.make_layer(config, moe.make_mask(moe.random_visible_sets(2, 1, 30, 6, sizes)))
    moe.draw_parameters(layer)
    assert type(layer.dispatcher) is OneRankDispatcher
    hidden, gradient = torch.randn(2, 11, 3, 8, device=DEVICE).to(config.params_dtype)
    token_ids = torch.randint(0, 30, (3, 11), device=DEVICE)
    found = compute(layer, hidden, token_ids, gradient)
    layer.dispatcher = StockDispatcher(layer, moe.process_groups())
    expected = compute(layer, hidden, token_ids, gradient)
    assert_same_tensors(found, expected)
    assert expected["hidden"].any()


def test_micro_batches_in_flight_do_not_share_memory() -> None:
    layer = moe.make_layer(moe.make_config(4, 1), moe.make_mask(moe.random_visible_sets(0, 1, 30, 4)))
    moe.draw_parameters(layer)
    inputs = torch.randn(2, 5, 2, 8, device=DEVICE)
    token_ids = torch.randint(0, 30, (2, 5), device=DEVICE)
    alone = [layer(hidden, padding_mask=token_ids)[0].clone() for hidden in inputs]
    together = [layer(hidden, padding_mask=token_ids)[0] for hidden in inputs]
    assert all(map(torch.equal, together, alone))
