"""Prepares the process for megatron before any test module imports it, and starts gloo ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The CPU adapter must be in place before megatron is first imported, whichever test comes first.
import maskmoe.training  # noqa: F401

# isort: split
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

RunRanks = Callable[..., None]

# A shell that starts the tests in the background lets them ignore Ctrl-C, and with them the processes under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """Megatron's process groups, each of this process alone."""
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Run `python SCRIPT FOLDER ARGUMENTS…` as ranks of one gloo group, on the CPU also where there are GPUs.

    The script joins the group with `init_method=f"file://{FOLDER}/rendezvous"`. A rank that fails or hangs fails the
    test.
    """

    def run(script: Path, folder: Path, *arguments: object, world_size: int = 2, timeout: float = 180) -> None:
        processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }
            with open(folder / f"rank{rank}.log", "w") as log:
                command = [sys.executable, str(script), str(folder), *map(str, arguments)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            failed = [rank for rank, process in enumerate(processes) if process.wait(timeout)]
        except subprocess.TimeoutExpired:
            failed = [rank for rank, process in enumerate(processes) if process.poll() is None]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            logs = "\n".join((folder / f"rank{rank}.log").read_text() for rank in failed)
            pytest.fail(f"ranks {failed} failed or hang\n{logs}")

    return run
