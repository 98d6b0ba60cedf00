"""Starts scripts as the ranks of one gloo group."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunRanks = Callable[..., None]
TESTS = Path(__file__).resolve().parents[1]
BENCHMARKS = TESTS.parent / "tools" / "benchmarks"
RANK_SCRIPTS = TESTS / "support" / "ranks"


def run_script_as_ranks(
    script: Path, folder: Path, *arguments: object, world_size: int = 2, timeout: float = 180
) -> None:
    """Run `python SCRIPT FOLDER ARGUMENTS…` as ranks of one gloo group, on the CPU also where there are GPUs.

    The script joins the group with `init_method=f"file://{FOLDER}/rendezvous"` and may import `support` and the benchmarks' modules. A rank that
    fails or hangs fails the test.
    """
    path = os.pathsep.join(filter(None, [str(TESTS), str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
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
