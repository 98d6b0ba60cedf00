"""Dispatchers: their choice, their costs, rows that arrive late, and dispatch within one rank."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer import transformer_config
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from meter import Cost, cost_of
from support.launchers import RunRanks
from support.small_moe import (
    DEVICE,
    draw_parameters,
    initialize_parallelism,
    make_config,
    make_layer,
    make_mask,
    make_model,
    plan_ids,
    process_groups,
    random_visible_sets,
    visible_halves,
)
from support.tensors import assert_same_tensors
from torch import Tensor

from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.process_patches import select_slots
from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher, choose_dispatch
from maskmoe.transformer.dispatch.one_copy import OneRankDispatcher
from maskmoe.transformer.dispatch.stock import MaskMoEAlltoAllTokenDispatcher, StockDispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

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
        ({"moe_expert_capacity_factor": 1.0}, {}, ONE_COPY, ONE_COPY),
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
def test_kind_of_dispatch(settings, ranks, kind_without_plan, kind, monkeypatch) -> None:
    # Megatron asks for the version of Transformer Engine when it reads deferred gradients.
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda _: True)
    config, pg_collection = make_config(4, **settings), groups(**ranks)
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
    config = make_config(6, topk, **settings)
    layer = make_layer(config, make_mask(random_visible_sets(2, 1, 30, 6, sizes)))
    draw_parameters(layer)
    assert type(layer.dispatcher) is OneRankDispatcher
    hidden, gradient = torch.randn(2, 11, 3, 8, device=DEVICE).to(config.params_dtype)
    token_ids = torch.randint(0, 30, (3, 11), device=DEVICE)
    found = compute(layer, hidden, token_ids, gradient)
    layer.dispatcher = StockDispatcher(layer, process_groups())
    expected = compute(layer, hidden, token_ids, gradient)
    assert_same_tensors(found, expected)
    assert expected["hidden"].any()


def test_micro_batches_in_flight_do_not_share_memory() -> None:
    layer = make_layer(make_config(4, 1), make_mask(random_visible_sets(0, 1, 30, 4)))
    draw_parameters(layer)
    inputs = torch.randn(2, 5, 2, 8, device=DEVICE)
    token_ids = torch.randint(0, 30, (2, 5), device=DEVICE)
    alone = [layer(hidden, padding_mask=token_ids)[0].clone() for hidden in inputs]
    together = [layer(hidden, padding_mask=token_ids)[0] for hidden in inputs]
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize(("sizes", "counts_rows"), [((1, 4), True), ((2, 4), False), ((3,), False)])
def test_stock_dispatch_counts_rows_only_where_their_number_varies(sizes: tuple[int, ...], counts_rows: bool) -> None:
    layer = make_layer(make_config(4, topk=2), make_mask(random_visible_sets(0, 1, 30, 4, sizes)))
    layer.dispatcher = StockDispatcher(layer, process_groups())
    assert type(layer.token_dispatcher) is MaskMoEAlltoAllTokenDispatcher
    assert layer.token_dispatcher.counts_rows is counts_rows


def test_all_gather_does_not_permute_by_transformer_engine() -> None:
    """The fused permutation fails if no gathered token uses an expert of the rank."""
    config = make_config(4, topk=2, moe_token_dispatcher_type="allgather")
    layer = make_layer(config, make_mask(random_visible_sets(0, 1, 30, 4)))
    layer.config.moe_permute_fusion = True  # the configuration would refuse the setting without Transformer Engine
    layer.dispatcher = StockDispatcher(layer, process_groups())
    assert type(layer.token_dispatcher) is MoEAllGatherTokenDispatcher
    assert not layer.token_dispatcher.config.moe_permute_fusion
    assert layer.config.moe_permute_fusion


# ---- Flex dispatch: what DeepEP and NCCL-EP are given; the libraries need GPUs ---------------------------------------


def multihot(experts: Tensor, values: Tensor) -> Tensor:
    """Return [tokens, 6], the sums of the values at the indices [tokens, k] that are not -1."""
    return values.new_zeros(len(experts), 7).scatter_add(1, experts + 1, values)[:, 1:]


@given(
    num_selected=st.lists(st.integers(0, 4), max_size=6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_slots_hold_the_selected_experts(num_selected: list[int], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank_of_expert = torch.rand(len(num_selected), 6, generator=generator).argsort(dim=1)
    routing_map = rank_of_expert < torch.tensor(num_selected, dtype=torch.int64).unsqueeze(1)
    # Half of the weights are 0, those of selected experts, too.
    probs = (torch.rand(routing_map.shape, generator=generator) - 0.5).relu().to(dtype) * routing_map
    probs.requires_grad_()
    weights, experts = select_slots(routing_map, probs, 4)
    assert (weights.dtype, experts.dtype) == (dtype, torch.int64)
    assert weights.shape == experts.shape == (len(num_selected), 4)
    assert weights.is_contiguous()
    assert experts.is_contiguous()
    assert torch.equal(multihot(experts, torch.ones_like(experts)), routing_map.long())  # no expert comes twice
    assert torch.equal(multihot(experts, weights), probs)
    weights.sum().backward()
    assert torch.equal(probs.grad, routing_map.to(dtype))


# ---- Two ranks -------------------------------------------------------------------------------------------------------

NUM_EXPERTS, VOCAB_SIZE, NUM_LAYERS, TOKENS = 8, 11, 3, 16
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def count(visible: np.ndarray, settings: dict[str, Any]) -> Cost:
    """Run a model with planned dispatch forward and backward, and return the cost; visible sets are [1, vocab, N]."""
    config = make_config(NUM_EXPERTS, topk=2, num_layers=NUM_LAYERS, expert_model_parallel_size=2, **settings)
    model = make_model(config, make_mask(visible.repeat(NUM_LAYERS, axis=0)), TOKENS)
    rng = np.random.default_rng(torch.distributed.get_rank())
    ids = torch.from_numpy(rng.integers(0, VOCAB_SIZE, (1, TOKENS))).to(DEVICE)
    position_ids = torch.arange(TOKENS, device=DEVICE).unsqueeze(0)
    # Compute logits only, because cross entropy has collectives of its own.
    return cost_of(lambda: model(ids, position_ids, None).mean().backward())


def late_all_to_all(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    """Replace torch's function; the received rows are NaN until they are waited for."""
    received = torch.empty_like(output)
    ALL_TO_ALL(received, input, *args, **kwargs)
    if not async_op:
        return output.copy_(received)
    output.fill_(torch.nan)
    return SimpleNamespace(wait=lambda: output.copy_(received))


ALL_TO_ALL = torch.distributed.all_to_all_single


def run_layer(kind: DispatchKind) -> dict[str, Tensor]:
    """Return the output and all gradients of a layer with shared experts, which compute while the rows travel."""
    settings = {"moe_shared_expert_intermediate_size": 10, "moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}
    config = make_config(NUM_EXPERTS, 2, expert_model_parallel_size=2, **settings)
    layer = make_layer(config, make_mask(visible_halves(VOCAB_SIZE, NUM_EXPERTS)))
    draw_parameters(layer)
    layer.dispatcher = build_dispatcher(kind, layer, process_groups())
    draws = torch.Generator().manual_seed(torch.distributed.get_rank())
    hidden, gradient = torch.randn(2, 7, 2, 8, generator=draws).to(DEVICE)
    hidden.requires_grad_()
    token_ids = TokenIds(torch.randint(0, VOCAB_SIZE, (2, 7), generator=draws).to(DEVICE))
    output, _ = layer(hidden, padding_mask=pack_token_ids(plan_ids(layer, token_ids)))
    output.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, **gradients}


def results_of_rank() -> dict[str, Any]:
    """Return the costs of planned dispatch, and what differs if rows arrive as late as possible."""
    initialize_parallelism(expert_model_parallel_size=2)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0, device=DEVICE))
    halves = visible_halves(VOCAB_SIZE, NUM_EXPERTS)
    two, one = (random_visible_sets(0, 1, VOCAB_SIZE, NUM_EXPERTS // 2, (size,)) for size in (2, 1))
    masks = {"any number": halves, "k": np.concatenate([two, np.zeros_like(two)], axis=2)}
    masks["one"] = np.concatenate([one & (np.arange(VOCAB_SIZE) % 2 == rank)[:, None] for rank in range(2)], axis=2)
    results: dict[str, Any] = {name: asdict(count(visible, {})) for name, visible in masks.items()}
    results["recomputed"] = asdict(count(halves, RECOMPUTE))
    for kind in (DispatchKind.PLANNED, DispatchKind.ONE_COPY):
        early = run_layer(kind)
        with patch.object(torch.distributed, "all_to_all_single", late_all_to_all):
            late = run_layer(kind)
        results[f"late {kind.name}"] = [name for name, value in early.items() if not torch.equal(value, late[name])]
    return results


@pytest.fixture(scope="module")
def two_ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(results_of_rank, tmp_path_factory.mktemp("dispatch"))


@pytest.mark.parametrize(
    ("visible", "all_to_alls", "waits"),
    [
        # Rows and weights cross, and outputs come back, forward and backward. Experts need counts on the host.
        ("any number", 6, 1),
        ("recomputed", 9, 2),
        # If no id sees more than k experts, the ids tell the counts.
        ("k", 6, 0),
        # If each id sees one expert, all weights are 1.
        ("one", 4, 0),
    ],
)
def test_costs_of_a_planned_layer(visible: str, all_to_alls: int, waits: int, two_ranks: list[dict[str, Any]]) -> None:
    """A micro-batch exchanges counts and waits for them once, even if layers are recomputed."""
    for results in two_ranks:
        assert results[visible]["all_to_alls"] == all_to_alls * NUM_LAYERS
        assert results[visible]["other_collectives"] == 1
        assert results[visible]["host_waits"] == 1 + waits * NUM_LAYERS


def test_late_rows_change_no_bit(two_ranks: list[dict[str, Any]]) -> None:
    for results in two_ranks:
        assert results["late PLANNED"] == results["late ONE_COPY"] == []
