"""Starts commands that launch a training run, and watches them."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.launchers import Processes


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
