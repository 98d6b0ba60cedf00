"""Starts Python programs as the ranks of one group, and ends them."""

import contextlib
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import torch
from support.paths import BENCHMARKS, TESTS, python_path
from support.preloaded import SIGNAL_OF_STACKS, ForkedProcess, PreloadedPython
from support.system import wait_until
from torch.distributed import TCPStore

from maskmoe.launch import machine

RunRanks = Callable[..., list[Any]]
TIMEOUT = 180.0
"""Seconds after which processes are taken to hang."""

GPU_ENVIRONMENT = {**machine.GPU_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""Variables of a process that computes on a GPU and one core."""

CPU_ENVIRONMENT = {**GPU_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
"""Variables that keep a process on one core and away from GPUs."""


@cache
def preloaded_python() -> PreloadedPython:
    """Return the preloaded Python of this process of pytest, which is started at first use."""
    return PreloadedPython({**os.environ, **CPU_ENVIRONMENT})


@dataclass(frozen=True)
class Outcome:
    """Exit codes and output of processes that have ended.

    Attributes:
        exit_codes: One for each rank; under torchrun the exit code of torchrun alone.
        errors: Text on stderr of each rank; under torchrun one text of all ranks.
        folder: Holds the output of the processes in `*.log`.
    """

    exit_codes: tuple[int, ...]
    errors: tuple[str, ...]
    folder: Path

    @property
    def output(self) -> str:
        """All output of all ranks, on stdout and stderr."""
        return read_logs(self.folder)

    def report(self) -> str:
        """Return the exit codes and the end of every log, for the message of a failing test."""
        logs = sorted(self.folder.glob("*.log"))
        return f"exit codes {self.exit_codes}\n" + "\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in logs)


def read_logs(folder: Path) -> str:
    """Return the text of all logs in a folder."""
    return "".join(log.read_text() for log in sorted(folder.glob("*.log")))


class Rendezvous:
    """A store at which the ranks of one group meet, as torchrun's agent hosts one.

    The store listens on a port that the system chose for it. So no other process can take the port before the ranks
    connect, as could happen with a port that was free a moment ago.
    """

    def __init__(self) -> None:
        self._store = TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=2 * TIMEOUT)
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make ranks connect to the store instead of hosting one in rank 0."""
        return {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


def rank_environments(ranks: int, rendezvous: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Return the variables that torchrun would set for each rank of one group on this machine.

    Args:
        ranks: Number of ranks.
        rendezvous: `MASTER_ADDR`, `MASTER_PORT` and the like. A single rank needs none: it may listen on any port.
    """
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    meeting = rendezvous or {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    return [size | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class Processes:
    """Running processes, which are killed with all of their descendants at the end of the `with` block."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen | ForkedProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the processes and all of their descendants."""
        for process in self._processes:
            kill_with_children(process)

    @property
    def output(self) -> str:
        """All output so far."""
        raise NotImplementedError

    def report(self) -> str:
        """Return what the processes have left so far, for the message of a failing test."""
        return self.output[-4000:]

    def pid_of_rank(self, rank: int) -> int | None:
        """Return the process id of a rank that the first process started; None while the rank is not running."""
        with contextlib.suppress(psutil.NoSuchProcess):
            # Parents come before their children, which inherit the variable.
            for child in psutil.Process(self._processes[0].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.environ().get("RANK") == str(rank):
                        return child.pid
        return None

    def wait_until(self, condition: Callable[[], object], what: str = "the condition") -> None:
        """Return as soon as `condition()` is true; fail the test if a process ends before, or after four minutes."""
        wait_until(
            condition,
            what,
            timeout=240,
            period=0.02,
            has_ended=lambda: any(process.poll() is not None for process in self._processes),
            report=self.report,
        )

    def wait_for_output(self, text: str) -> None:
        """Return as soon as the output contains a text, see `wait_until`."""
        self.wait_until(lambda: text in self.output, repr(text))

    def wait_for_iteration(self, iteration: int) -> None:
        """Return as soon as training logs an iteration, see `wait_until`."""
        self.wait_until(lambda: re.search(rf"iteration +{iteration}/", self.output), f"iteration {iteration}")


class RankProcesses(Processes):
    """Running processes of one group.

    Args:
        program: Python's arguments.
        environments: Variables of each process, see `rank_environments`; one empty dict for torchrun.
        folder: The output goes to `out0.log`, `err0.log` and so on in this folder.
        working_folder: Working directory of the processes.
        environment: Further variables of all processes.
        rendezvous: Kept alive as long as the processes.
        sees_gpus: Whether the processes see the GPUs of this machine.
        are_preloaded: Whether the processes are forks of a process that has imported what training imports. Processes
            that see GPUs never are.

    Attributes:
        folder: Holds the logs.
    """

    def __init__(
        self,
        program: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        folder: Path,
        working_folder: Path,
        environment: Mapping[str, str] | None = None,
        rendezvous: Rendezvous | None = None,
        sees_gpus: bool = False,
        are_preloaded: bool = False,
    ) -> None:
        super().__init__()
        self.folder = folder
        self._rendezvous = rendezvous
        common = GPU_ENVIRONMENT if sees_gpus else CPU_ENVIRONMENT
        for rank, variables in enumerate(environments):
            with open(folder / f"out{rank}.log", "w") as out, open(folder / f"err{rank}.log", "w") as err:
                every_variable = {**os.environ, **common, **(environment or {}), **variables}
                if are_preloaded and not sees_gpus:
                    process = preloaded_python().start(program, working_folder, every_variable, out, err)
                else:
                    process = subprocess.Popen(
                        [sys.executable, *program],
                        cwd=working_folder,
                        env=every_variable,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids, one for each rank; under torchrun the id of torchrun alone."""
        return [process.pid for process in self._processes]

    @property
    def output(self) -> str:
        """All output so far."""
        return read_logs(self.folder)

    def report(self) -> str:
        """Return exit codes and the ends of all logs."""
        return self.outcome().report()

    @property
    def is_running(self) -> bool:
        """Whether at least one process has not ended."""
        return any(process.poll() is None for process in self._processes)

    def wait(self, all_end: bool = False, timeout: float = TIMEOUT) -> Outcome:
        """Wait until all processes have ended or one has failed; then kill the remaining processes.

        Args:
            all_end: Wait for all processes even if one fails.
            timeout: Seconds after which all processes are killed.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [process.poll() for process in self._processes]
            if None not in codes or (any(codes) and not all_end):
                break
            time.sleep(0.05)
        else:
            # The report of the failing test shows where the processes hang.
            for process in self._processes:
                if isinstance(process, ForkedProcess) and process.poll() is None:
                    os.kill(process.pid, SIGNAL_OF_STACKS)
            time.sleep(1)
        self.kill()
        return self.outcome()

    def outcome(self) -> Outcome:
        """Return what the processes have left so far."""
        errors = tuple((self.folder / f"err{rank}.log").read_text() for rank in range(len(self._processes)))
        return Outcome(tuple(process.returncode for process in self._processes), errors, self.folder)


def start_ranks(
    program: Sequence[str],
    folder: Path,
    *,
    ranks: int = 1,
    working_folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    sees_gpus: bool = False,
    are_preloaded: bool = False,
) -> RankProcesses:
    """Start Python on `program` as the ranks of one group.

    Args:
        program: Python's arguments.
        folder: Takes the logs.
        ranks: Number of ranks.
        working_folder: Working directory of the processes, by default `folder`.
        environment: Further variables of all processes.
        sees_gpus: Whether the processes see the GPUs of this machine.
        are_preloaded: See `RankProcesses`.
    """
    rendezvous = Rendezvous() if ranks > 1 else None
    environments = rank_environments(ranks, rendezvous and rendezvous.environment)
    return RankProcesses(
        program, environments, folder, working_folder or folder, environment, rendezvous, sees_gpus, are_preloaded
    )


def run_program(program: str, folder: Path, ranks: int = 1) -> str:
    """Run Python on `program` in a folder, as the ranks of one group; return their output, fail the test if one fails.

    Args:
        program: Python's arguments, as on a shell's command line.
        folder: Working directory of the ranks. Their logs go into a new folder in it.
        ranks: Number of ranks.
    """
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=folder))
    with start_ranks(shlex.split(program), logs, ranks=ranks, working_folder=folder, are_preloaded=True) as processes:
        outcome = processes.wait(timeout=600)
        if any(outcome.exit_codes):
            pytest.fail(outcome.report())
        return processes.output


def run_as_ranks(
    function: Callable[..., Any],
    folder: Path,
    *arguments: object,
    world_size: int = 2,
    timeout: float = TIMEOUT,
    sees_gpus: bool = False,
    uses_transformer_engine: bool = False,
    joins: bool = True,
) -> list[Any]:
    """Run a function of a module as the ranks of one group, and return the result of each rank.

    A rank that fails or hangs fails the test.

    Args:
        function: Each rank imports its module anew, after `prepare_process`.
        folder: Takes the logs and the results.
        arguments: Arguments of the function, which are pickled.
        world_size: Number of ranks.
        timeout: Seconds after which the ranks are taken to hang.
        sees_gpus: Whether the ranks see the GPUs of this machine.
        uses_transformer_engine: Whether Megatron imports the installed Transformer Engine, on the CPU.
        joins: Whether the ranks join a process group before they call the function.
    """
    code = function.__code__
    work = (code.co_filename, code.co_name, arguments, uses_transformer_engine, joins)
    (folder / "work.pickle").write_bytes(pickle.dumps(work))
    with start_ranks(
        ["-m", "support.rank_program", str(folder)],
        folder,
        ranks=world_size,
        environment={"PYTHONPATH": python_path(TESTS, BENCHMARKS)},
        sees_gpus=sees_gpus,
        are_preloaded=not uses_transformer_engine,
    ) as processes:
        outcome = processes.wait(timeout=timeout)
    if any(outcome.exit_codes):
        pytest.fail(f"a rank failed or hung\n{outcome.report()}")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def kill_with_children(process: subprocess.Popen | ForkedProcess) -> None:
    """Kill a process and all its descendants; torchrun's ranks are in process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Launch(Processes):
    """A command that launches a run, started when the object is made.

    Args:
        command: the program and its arguments.
        folder: the folder to run in, which also receives the log.
        run_dir: the folder of the run.
        environment: variables in addition to a minimal environment without GPUs.
    """

    def __init__(
        self, command: Sequence[str | Path], folder: Path, run_dir: Path, environment: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.run_dir = run_dir
        self._log = folder / f"{run_dir.name}-{len(list(folder.glob('*.log')))}.log"
        variables = {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"], "HOME": str(folder)}
        if "PYTHONPATH" in os.environ:  # tests of a checkout that is not the installed one
            variables["PYTHONPATH"] = os.environ["PYTHONPATH"]
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**variables, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes = [self.process]

    @property
    def output(self) -> str:
        """All output of the command so far."""
        return self._log.read_text()

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    def wait(self) -> int:
        """Wait until the command exits, and return its exit code."""
        return self.process.wait(240)
