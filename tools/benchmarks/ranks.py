"""Benchmarks that run as one process, or as several under torchrun."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import harness
import torch
from device_meter import DeviceCost, device_cost_of
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from meter import Cost, cost_of

from maskmoe.errors import RunFailure
from maskmoe.megatron_compat import cpu
from maskmoe.processes.run_tool import run_tool


@dataclass(frozen=True)
class SideCost:
    """The costs of one side of a case.

    Attributes:
        cost: counted by intercepting calls of functions, on any device.
        device: counted by the profiler; None without a GPU.
    """

    cost: Cost
    device: DeviceCost | None

    def __str__(self) -> str:
        return str(self.cost) if self.device is None else f"{self.cost}; {self.device}"

    @classmethod
    def of(cls, work: Callable[[], object]) -> "SideCost":
        """Do the work, and return its costs."""
        return cls(cost_of(work), None if cpu.is_installed() else device_cost_of(work))


def join_ranks() -> ProcessGroupCollection:
    """Join the ranks, all expert-parallel; set one thread, a fixed seed and quiet logs."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("gloo" if cpu.is_installed() else "nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)
    return ProcessGroupCollection.use_mpu_process_groups()


def compare(name: str, ours: Callable[[], object], against: str, baseline: Callable[[], object]) -> harness.Case:
    """Build a case that measures the time until all ranks have finished; print the costs of rank 0 on stderr.

    Args:
        name: the name of the case.
        ours: the work.
        against: the name of the baseline.
        baseline: the work of the baseline.

    Raises:
        RunFailure: Ours does all operations of the baseline one after the other, perhaps after planning.
    """
    # The first round initializes what later rounds share.
    ours(), baseline()
    costs = {"ours": SideCost.of(ours), against: SideCost.of(baseline)}
    if costs[against].cost.operations in costs["ours"].cost.operations:
        raise RunFailure(f"{name}: ours does the operations of {against}, so the comparison would say nothing")
    if torch.distributed.get_rank() == 0:
        for side, cost in costs.items():
            print(f"{name}: {side} {cost}", file=sys.stderr)
    return harness.Case(name, "s", _seconds_of_all(ours), _seconds_of_all(baseline), costs)


def run_and_report(
    cases: Callable[[argparse.Namespace, ProcessGroupCollection], Iterable[harness.Case]],
    parser: argparse.ArgumentParser,
) -> None:
    """Run a benchmark as a tool: join the ranks, measure the cases, report the results, and leave the process group."""

    def main() -> None:
        arguments = parser.parse_args()
        measure(cases(arguments, join_ranks()), arguments)
        torch.distributed.destroy_process_group()

    run_tool(main)


def measure(cases: Iterable[harness.Case], arguments: argparse.Namespace) -> None:
    """Measure the cases on all ranks; rank 0 reports the results."""
    results = harness.run(cases, arguments.repeats)
    if torch.distributed.get_rank() == 0:
        harness.report(results, arguments.json)
    for _ in results:  # The other ranks take part.
        pass


def _seconds_of_all(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that measures the seconds until all ranks have done the work."""

    def work_on_all_ranks() -> None:
        torch.distributed.barrier()
        work()
        torch.cuda.synchronize()
        torch.distributed.barrier()

    return harness.seconds(work_on_all_ranks)
