"""One rank of one-copy dispatch: `python one_copy_ranks.py FOLDER SEEDS`, with RANK and WORLD_SIZE set.

Each expert multiplies its input by a vector, so that every rank can compute all expected results by itself. The script
writes the largest deviations, and the calls and elements of all-to-alls, to `rankR.json`.
"""

import json
import os
import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from fixed_router import FixedRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from support.rank_program import run_as_rank
from torch import Tensor

from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher
from maskmoe.transformer.token_ids import TokenIds

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
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=len(scales),
        moe_router_topk=int(case["topk"]),
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
    )
    dispatcher = OneCopyDispatcher(config, torch.distributed.group.WORLD)
    own_hidden, own_weights = (case[name].clone().requires_grad_() for name in ("hidden", "weights"))
    own_scales = case["scales"][rank * local_experts :][:local_experts].clone().requires_grad_()
    router = FixedRouter(own_weights, case["chosen"])
    dispatched = dispatcher.route_and_dispatch(own_hidden.unsqueeze(1), NO_IDS, router)
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


def main() -> None:
    folder, seeds = Path(sys.argv[1]), range(int(sys.argv[2]))
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    results = []
    for seed in seeds:
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
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
