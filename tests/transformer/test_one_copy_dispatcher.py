"""Dispatch of one copy a rank, on 1 to 8 real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.launchers import RANK_SCRIPTS
from support.small_moe import make_config

from maskmoe.transformer.dispatch.kind import DispatchKind
from maskmoe.transformer.moe_layer import dispatch_kind

PROGRAM = RANK_SCRIPTS / "one_copy_ranks.py"


def run_ranks(folder: Path, num_ranks: int, num_cases: int) -> list[list[dict[str, float]]]:
    """What each rank found in each case."""
    environment = os.environ | {"WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, PROGRAM, folder, str(num_cases)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(num_ranks)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4, 8))])
def test_equals_one_process(tmp_path, num_ranks):
    """Outputs and gradients to rounding of sums of at most 32 terms, and every row crosses once."""
    for of_rank in run_ranks(tmp_path, num_ranks, num_cases=60):
        for result in of_rank:
            assert all(result[name] < 1e-5 for name in ("output", "hidden", "weights")), result
            assert result["scales"] < 1e-4, result
            if num_ranks > 1:
                assert result["excess_elements"] == 0
                assert result["calls"] == 4


def groups(expert_parallel: int = 2, expert_tensor_parallel: int = 1) -> SimpleNamespace:
    """As much of a `ProcessGroupCollection` as is asked."""
    sizes = {"ep": expert_parallel, "expt_tp": expert_tensor_parallel}
    return SimpleNamespace(**{name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()})


def test_kind_of_dispatch():
    assert dispatch_kind(make_config(4), groups(), is_rank_local=False) is DispatchKind.ONE_COPY
    assert dispatch_kind(make_config(4), groups(), is_rank_local=True) is DispatchKind.PLANNED
    for settings in ({"moe_expert_capacity_factor": 1.0}, {"moe_input_jitter_eps": 0.1}):
        assert dispatch_kind(make_config(4, **settings), groups(), is_rank_local=True) is DispatchKind.ONE_COPY
    one_expert = make_config(4, topk=1)
    assert dispatch_kind(one_expert, groups(), is_rank_local=False) is DispatchKind.STOCK
    assert dispatch_kind(one_expert, groups(), is_rank_local=True) is DispatchKind.PLANNED


def test_what_the_dispatcher_cannot_do_is_left_to_megatrons():
    for of_groups in (groups(expert_parallel=1), groups(expert_tensor_parallel=2)):
        assert dispatch_kind(make_config(4), of_groups, is_rank_local=True) is DispatchKind.STOCK
    for settings in (
        {"moe_token_dispatcher_type": "allgather"},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True},
    ):
        assert dispatch_kind(make_config(4, **settings), groups(), is_rank_local=True) is DispatchKind.STOCK
