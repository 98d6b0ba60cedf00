"""Benchmarks that run as one process, or as several under torchrun."""

import argparse
import logging
import os
from collections.abc import Callable, Iterable

import harness
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from meter import cost_of

from maskmoe.megatron_compat import cpu


def join_ranks() -> ProcessGroupCollection:
    """The process groups of this rank, seeded; all ranks are expert-parallel. One thread each, and no chatter."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    torch.distributed.init_process_group("gloo" if cpu.is_installed() else "nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


def compare(name: str, ours: Callable[[], object], against: str, baseline: Callable[[], object]) -> harness.Case:
    """A case by the time until all ranks have done the work; says what one rank spends on it besides.

    Args:
        name: of the case.
        ours: the work.
        against: what the baseline is.
        baseline: the other work.
    """
    costs = {"ours": cost_of(ours), against: cost_of(baseline)}
    if torch.distributed.get_rank() == 0:
        for side, cost in costs.items():
            print(f"{name}: {side} {cost}", flush=True)
    return harness.Case(name, "s", _seconds_of_all(ours), _seconds_of_all(baseline), costs)


def run_and_report(cases: Iterable[harness.Case], arguments: argparse.Namespace) -> None:
    """Measure, report, and leave the other ranks."""
    results = harness.run(cases, arguments.repeats)
    if torch.distributed.get_rank() == 0:
        harness.report(results, arguments.json)
    torch.distributed.destroy_process_group()


def _seconds_of_all(work: Callable[[], object]) -> Callable[[], float]:
    def until_all_have() -> None:
        torch.distributed.barrier()
        work()
        torch.cuda.synchronize()
        torch.distributed.barrier()

    return harness.seconds(until_all_have)
