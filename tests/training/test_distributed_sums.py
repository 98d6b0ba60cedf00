"""What two ranks add up, weigh and compare is what one rank computes."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import mpu, parallel_state, rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank
from support.launchers import RunRanks
from support.small_moe import make_config, make_mask, make_router, random_visible_sets

from maskmoe.megatron_compat.globals import global_args
from maskmoe.training.evaluation.token_losses import sum_over_ranks
from maskmoe.training.model.batch import loss_function
from maskmoe.training.watch import routing_log

ROWS = (12, 9)  # of the micro-batches of each rank
LENGTH = 16


def loss_with_context_parallelism() -> dict[str, Any]:
    """Return the loss that Megatron makes of each rank's part of a masked micro-batch, and plain torch's mean."""
    torch.manual_seed(0)
    # [batch, sequence]; the ranks have different numbers of tokens with a loss.
    losses, mask = torch.rand(2, LENGTH), (torch.rand(2, LENGTH) < 0.4).float()
    group = mpu.get_context_parallel_group()
    part = get_batch_on_this_cp_rank(
        {"losses": losses, "mask": mask, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=group
    )
    rerun_state_machine.initialize_rerun_state_machine(mode=rerun_state_machine.RerunMode.DISABLED)
    args = Namespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False, calculate_per_token_loss=False)
    args.context_parallel_size = 2
    with global_args(args):
        loss, num_tokens, logged = loss_function(part["mask"], part["losses"])
    # As Megatron does, divide by the rank's tokens and average over the ranks; and add up the logged sums.
    loss, logged = loss / num_tokens / 2, logged["lm loss"]
    torch.distributed.all_reduce(loss)
    torch.distributed.all_reduce(logged)
    mean = (losses * mask).sum() / mask.sum()
    return {"loss": [loss, mean], "logged": [logged[0] / logged[1], mean], "tokens": [logged[1], mask.sum()]}


def sums_with_tensor_parallelism() -> dict[str, Any]:
    """Return the sum of values that both ranks of a tensor-parallel group have."""
    return {"evaluated tokens": [sum_over_ranks(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0])]}


def rows_with_expert_parallelism() -> dict[str, Any]:
    """Return the routing that two expert-parallel ranks, which both have rows, have logged."""
    config, mask = make_config(8, 3, num_layers=1), make_mask(random_visible_sets(0, 1, 20, 8))
    chunk = torch.nn.ModuleList([make_router(config, mask, layer_number=1)])
    chunk.config = replace(config, expert_model_parallel_size=2)
    statistics = chunk[0].statistics
    statistics.count_rows(ROWS[torch.distributed.get_rank()])
    # Tokens, routable tokens, the sum of their entropies, and the tokens of each expert.
    statistics.add_tokens(torch.tensor([8, 4, 3.0, 5, 1, 0, 0, 4, 1, 1, 0], dtype=torch.float64))
    args = Namespace(num_layers=1, moe_layer_freq=1, num_experts=8, mtp_num_layers=None)
    with global_args(args):
        record = routing_log.take_record([chunk])
    return {
        "most rows": [record.by_layer["rank_rows_max"][0], max(ROWS)],
        "tokens of an expert": [record.tokens_per_expert[0][0], 2 * 5.0],
        "entropy": [record.by_layer["routing_entropy"][0], 3 / 4],
    }


def compute() -> dict[str, Any]:
    """Return what these ranks found, and what is expected, by name."""
    found = {}
    for sizes, function in (
        ({"context_parallel_size": 2}, loss_with_context_parallelism),
        ({"tensor_model_parallel_size": 2}, sums_with_tensor_parallelism),
        ({"expert_model_parallel_size": 2}, rows_with_expert_parallelism),
    ):
        parallel_state.initialize_model_parallel(**sizes)
        found |= function()
        parallel_state.destroy_model_parallel()
    return {name: [torch.as_tensor(value).tolist() for value in pair] for name, pair in found.items()}


def test_two_ranks_equal_one(run_ranks: RunRanks, tmp_path: Path) -> None:
    for found in run_ranks(compute, tmp_path):
        for name, (value, expected) in found.items():
            assert value == pytest.approx(expected, rel=1e-6), name
