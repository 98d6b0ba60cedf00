"""Starts commands that launch a training run, and watches them."""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from support.launchers import kill_with_children
from support.waiting import wait_until

TIMEOUT = 240  # seconds


class Launch:
    """A command that launches a run, started when the object is made.

    At the end of a `with` block, the command and all of its descendants are killed.

    Args:
        command: the program and its arguments.
        folder: the folder to run in, which also receives the log.
        run_dir: the folder of the run.
        environment: variables in addition to a minimal environment without GPUs.
    """

    def __init__(
        self, command: Sequence[str | Path], folder: Path, run_dir: Path, environment: Mapping[str, str]
    ) -> None:
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

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the command and all of its descendants."""
        kill_with_children(self.process)

    @property
    def output(self) -> str:
        """All output of the command so far."""
        return self._log.read_text()

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    def descendants(self) -> list[psutil.Process]:
        """Return the command's children, their children, and so on."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def pid_of_rank(self, rank: int) -> int:
        """Return the process id of a rank."""
        for descendant in self.descendants():
            if descendant.environ().get("RANK") == str(rank):
                return descendant.pid
        pytest.fail(f"no process has rank {rank}\n{self.output[-4000:]}")

    def wait(self) -> int:
        """Wait until the command exits, and return its exit code."""
        return self.process.wait(TIMEOUT)

    def wait_for_iteration(self, iteration: int) -> None:
        """Wait until training logs an iteration; fail if the command exits before."""
        line = re.compile(rf"iteration +{iteration}/")
        self._wait_for(lambda: bool(line.search(self.output)), f"iteration {iteration}")

    def wait_for_output(self, text: str) -> None:
        """Wait until the output contains a text; fail if the command exits before."""
        self._wait_for(lambda: text in self.output, repr(text))

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(
            condition,
            what,
            timeout=TIMEOUT,
            period=0.02,
            has_ended=lambda: self.process.poll() is not None,
            report=lambda: self.output[-4000:],
        )
