"""Run one rank that dispatches with real collectives: `python dispatch_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

Reads `cases.npz` and `rank_local.safetensors` from the folder. Dispatches and combines tokens, forward and backward,
and writes to `rankR.json` the bytes that each collective sent to each rank.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import numpy as np
import torch
from fixed_router import FixedRouter
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from support.rank_program import run_as_rank
from torch import Tensor

from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher
from maskmoe.transformer.dispatch.planned import DispatchPlanner, PlannedDispatcher
from maskmoe.transformer.dispatch.stock import MaskMoEAlltoAllTokenDispatcher
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts

NO_IDS = TokenIds(torch.empty(0, dtype=torch.int64))  # A fixed router reads no ids.


class Record:
    """Replaces torch's collectives by functions that also record the bytes sent to each rank."""

    def __init__(self, num_ranks: int, hidden_size: int):
        self._num_ranks, self._hidden_size = num_ranks, hidden_size
        self._all_to_all = torch.distributed.all_to_all_single
        self._all_gather = torch.distributed.all_gather_into_tensor
        torch.distributed.all_to_all_single = self.all_to_all
        torch.distributed.all_gather_into_tensor = mappings.dist_all_gather_func = self.all_gather
        self.calls: list[tuple[str, list[int]]] = []

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        **kwargs,
    ):
        if input_split_sizes is None:
            input_split_sizes = [len(input) // self._num_ranks] * self._num_ranks
        bytes_per_row = input.element_size() * input[:1].numel() if len(input) else 0
        what = "counts"
        if input.is_floating_point():
            what = "hidden states" if input.shape[1:] == (self._hidden_size,) else "weights"
        self.calls.append((what, [int(rows) * bytes_per_row for rows in input_split_sizes]))
        return self._all_to_all(output, input, output_split_sizes, input_split_sizes, **kwargs)

    def all_gather(self, output: Tensor, input: Tensor, **kwargs):
        what = "token ids" if input.dtype is torch.int32 else "counts"
        self.calls.append((what, [input.nbytes] * self._num_ranks))
        return self._all_gather(output, input, **kwargs)

    def take(self) -> list[tuple[str, list[int]]]:
        """Return the calls since the last call of this method."""
        calls, self.calls = self.calls, []
        return calls


def dispatch_rows(dispatcher: MoEAlltoAllTokenDispatcher, hidden: Tensor, routing_map: Tensor) -> None:
    """Send a row for every selected expert, forward and backward."""
    hidden, probs = hidden.clone().requires_grad_(), routing_map.float().requires_grad_()
    rows, weights = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
    output = dispatcher.token_combine(dispatcher.combine_preprocess(rows * weights.unsqueeze(1)))
    dispatcher.combine_postprocess(output).sum().backward()


def dispatch_copies(dispatcher: OneCopyDispatcher, hidden: Tensor, routing_map: Tensor) -> None:
    """Send one copy to each rank, forward and backward."""
    hidden, probs = hidden.clone().requires_grad_(), routing_map.float().requires_grad_()
    dispatched = dispatcher.route_and_dispatch(hidden.unsqueeze(1), NO_IDS, FixedRouter(probs, routing_map))
    outputs = dispatched.expert_input * dispatched.weights.unsqueeze(1)
    dispatcher.combine(outputs, dispatched.metadata).sum().backward()


def dispatch_planned(
    dispatcher: PlannedDispatcher,
    visible_experts: VisibleExperts,
    topk: int,
    hidden: Tensor,
    token_ids: Tensor,
    groups: ProcessGroupCollection,
) -> None:
    """One copy a rank, planned; the first visible experts are selected."""
    plan = DispatchPlanner(visible_experts, topk, [0], groups.ep).plan(TokenIds(token_ids.unsqueeze(0)))
    visible = visible_experts(plan.of_table[0].received_ids.flatten(), 0).experts
    routing_map = visible & (visible.cumsum(dim=1) <= topk)
    router = FixedRouter(routing_map.float().requires_grad_(), routing_map)
    planned_ids = TokenIds(token_ids.unsqueeze(1), plan=plan)
    dispatched = dispatcher.route_and_dispatch(hidden.clone().requires_grad_().unsqueeze(1), planned_ids, router)
    outputs = dispatched.expert_input * dispatched.weights.unsqueeze(1)
    dispatcher.combine(outputs, dispatched.metadata).sum().backward()


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with np.load(folder / "cases.npz") as arrays:
        cases = {name: torch.from_numpy(arrays[name][rank]) for name in ("token_ids", "top-k", "mask")}
        topk, hidden_size = int(arrays["topk"]), int(arrays["hidden_size"])
    num_tokens, num_experts = cases["top-k"].shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=topk,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=num_ranks,
        add_bias_linear=False,
    )
    local_experts = num_experts // num_ranks
    indices = list(range(rank * local_experts, (rank + 1) * local_experts))
    hidden = torch.ones(num_tokens, hidden_size)
    visible_experts = VisibleExperts(config, RoutingMask.load(folder / "rank_local.safetensors"), groups)

    stock = MoEAlltoAllTokenDispatcher(local_experts, indices, config, groups)
    of_any_number = MaskMoEAlltoAllTokenDispatcher(local_experts, indices, config, groups, min_visible=1)
    one_copy = OneCopyDispatcher(config, groups.ep)
    works: dict[str, Callable[[], None]] = {
        "top-k, row per expert": lambda: dispatch_rows(stock, hidden, cases["top-k"]),
        "top-k, one copy": lambda: dispatch_copies(one_copy, hidden, cases["top-k"]),
        "mask, row per expert": lambda: dispatch_rows(of_any_number, hidden, cases["mask"]),
        "mask, one copy": lambda: dispatch_copies(one_copy, hidden, cases["mask"]),
        "rank-local mask, planned": lambda: dispatch_planned(
            PlannedDispatcher(config, groups.ep), visible_experts, topk, hidden, cases["token_ids"], groups
        ),
    }
    record, calls = Record(num_ranks, hidden_size), {}
    for name, work in works.items():
        work()
        calls[name] = record.take()
    (folder / f"rank{rank}.json").write_text(json.dumps(calls))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
