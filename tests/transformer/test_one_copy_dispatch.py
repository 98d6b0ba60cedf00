"""One-copy dispatch on 1 to 8 real ranks, dispatch within one rank, and the choice of the way to dispatch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixed_router import FixedRouter
from support.launchers import RunRanks
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
from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher, OneRankDispatcher
from maskmoe.transformer.dispatch.stock import StockDispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds

on_cpu = pytest.mark.skipif(not cpu.is_installed(), reason="Megatron's dispatcher adds in a random order on GPUs")

HIDDEN = 8
NO_IDS = TokenIds(torch.empty(0, dtype=torch.int64))  # A fixed router reads no ids.


class CountedAllToAll:
    """Replaces `all_to_all_single` and counts calls with hidden states and their elements."""

    def __init__(self):
        self._stock = torch.distributed.all_to_all_single
        torch.distributed.all_to_all_single = self
        self.calls = self.elements = 0

    def __call__(self, output: Tensor, input: Tensor, *args, **kwargs):
        if input.is_floating_point() and input.shape[-1] == HIDDEN:
            self.calls += 1
            self.elements += input.numel()
        return self._stock(output, input, *args, **kwargs)


def draw_case(seed: int, rank: int, num_ranks: int) -> dict[str, Tensor]:
    """Draw tokens and their experts. The number of experts and k are the same on all ranks; the rest may differ."""
    common = torch.Generator().manual_seed(seed)
    local_experts = int(torch.randint(1, 5, (), generator=common))
    num_experts = local_experts * num_ranks
    topk = int(torch.randint(1, num_experts + 1, (), generator=common))
    kind = ("any", "rank-local", "starved rank", "no tokens", "no experts")[seed % 5]
    scales = torch.randn(num_experts, HIDDEN, generator=common)
    own = torch.Generator().manual_seed(1000 * seed + rank)
    num_tokens = 0 if kind == "no tokens" and rank == seed % num_ranks else int(torch.randint(1, 20, (), generator=own))
    score = torch.rand(num_tokens, num_experts, generator=own)
    if kind == "rank-local":
        home = torch.randint(0, num_ranks, (num_tokens, 1), generator=own)
        score[torch.arange(num_experts) // local_experts != home] = 0
    if kind == "starved rank":
        score[:, :local_experts] = 0
    if kind == "no experts":  # as where a capacity is exceeded
        score[: num_tokens // 2] = 0
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(topk, dim=1).indices, True) & (score > 0)
    weights = torch.rand(num_tokens, num_experts, generator=own).masked_fill(~chosen, 0)
    weights[chosen & (score > 0.9)] = 0  # weights that are rounded to 0 are selected nevertheless
    hidden, gradient = torch.randn(2, num_tokens, HIDDEN, generator=own)
    return {
        "hidden": hidden,
        "gradient": gradient,
        "weights": weights,
        "chosen": chosen,
        "scales": scales,
        "topk": torch.tensor(topk),
    }


def deviations(case: dict[str, Tensor], rank: int, num_ranks: int) -> dict[str, float]:
    """Return the largest differences from the results of one process."""
    hidden, weights, scales = (case[name].clone().requires_grad_() for name in ("hidden", "weights", "scales"))
    per_expert = hidden.unsqueeze(1) * scales * (weights * case["chosen"]).unsqueeze(2)  # [tokens, experts, hidden]
    per_expert.sum(dim=1).backward(case["gradient"])

    local_experts = len(scales) // num_ranks
    config = make_config(len(scales), int(case["topk"]), hidden_size=HIDDEN, moe_router_pre_softmax=True)
    dispatcher = OneCopyDispatcher(config, torch.distributed.group.WORLD)
    own_hidden, own_weights = (case[name].clone().requires_grad_() for name in ("hidden", "weights"))
    own_scales = case["scales"][rank * local_experts :][:local_experts].clone().requires_grad_()
    router = FixedRouter(own_weights, case["chosen"])
    dispatched = dispatcher.start_dispatch(own_hidden.unsqueeze(1), NO_IDS, router)()
    scale_of_row = own_scales.repeat_interleave(dispatched.tokens_per_expert, dim=0)
    expert_output = dispatched.expert_input * scale_of_row * dispatched.weights.unsqueeze(1)
    output = dispatcher.combine(expert_output, dispatched.metadata).squeeze(1)
    output.backward(case["gradient"])

    expected_scales = scales.grad.clone()
    torch.distributed.all_reduce(expected_scales)
    return {
        "output": _difference(output, per_expert.sum(dim=1)),
        "hidden": _difference(own_hidden.grad, hidden.grad),
        "weights": _difference(own_weights.grad, weights.grad),
        "scales": _difference(own_scales.grad, expected_scales[rank * local_experts :][:local_experts]),
    }


def _difference(values: Tensor, expected: Tensor) -> float:
    return (values - expected).abs().max().item() if values.numel() else 0.0


def results_of_rank(num_cases: int) -> list[dict[str, float]]:
    """Return, for each case, the largest deviations, the calls of all-to-alls, and their elements beyond the needed."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = []
    for seed in range(num_cases):
        case = draw_case(seed, rank, num_ranks)
        counted = CountedAllToAll()
        result = deviations(case, rank, num_ranks)
        torch.distributed.all_to_all_single = counted._stock
        of_rank = case["chosen"].unflatten(1, (num_ranks, -1))
        rows = torch.tensor([int(of_rank.any(dim=-1).sum())])
        received = of_rank.any(dim=-1).sum(dim=0)
        torch.distributed.all_reduce(received)
        # Dispatch sends rows and combine sends sums back, forward and backward: two times the rows of each direction.
        result["excess_elements"] = counted.elements - 2 * HIDDEN * int(rows + received[rank])
        result["calls"] = counted.calls
        results.append(result)
    return results


@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4, 8))])
def test_equals_one_process(tmp_path: Path, num_ranks: int, run_ranks: RunRanks) -> None:
    """Outputs and gradients equal up to rounding of sums of at most 32 terms, and every row crosses once."""
    for results in run_ranks(results_of_rank, tmp_path, 60, world_size=num_ranks, timeout=240):
        for result in results:
            assert all(result[name] < 1e-5 for name in ("output", "hidden", "weights")), result
            assert result["scales"] < 1e-4, result
            if num_ranks > 1:
                assert result["excess_elements"] == 0
                assert result["calls"] == 4


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
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert expected["hidden"].any()


def test_micro_batches_in_flight_do_not_share_memory() -> None:
    layer = make_layer(make_config(4, 1), make_mask(random_visible_sets(0, 1, 30, 4)))
    draw_parameters(layer)
    inputs = torch.randn(2, 5, 2, 8, device=DEVICE)
    token_ids = torch.randint(0, 30, (2, 5), device=DEVICE)
    alone = [layer(hidden, padding_mask=token_ids)[0].clone() for hidden in inputs]
    together = [layer(hidden, padding_mask=token_ids)[0] for hidden in inputs]
    assert all(map(torch.equal, together, alone))
