"""Run the command of a stage with its output in a log, and stop the command together with all its processes."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from maskmoe.processes.child_process import end_with_parent, send_signal
from maskmoe.workflow.lock import RunLock

_SECONDS_TO_END = 45.0  # torchrun gives its workers 30 seconds


class StageProcess:
    """A running command in the current folder. On Linux the command ends when this process ends, even if killed.

    Args:
        command: program and arguments.
        environment: variables that are set in addition to the variables of this process.
        log: file to which the output is appended.
        lock: lock of the run folder; all processes of the command hold the lock, too.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, lock: RunLock) -> None:
        with open(log, "ab") as output:
            self._log, self._position = log, output.tell()
            self._process = psutil.Popen(
                command,
                # `python -m` would import the user's files of the current folder before the standard library.
                env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
                # torchrun's workers inherit only the standard streams, so a standard stream carries the lock.
                stdin=lock,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches only this process, which then stops the command in good order.
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
            )

    @property
    def exit_code(self) -> int | None:
        """Exit code; None while the command runs; negative if a signal ended the command."""
        return self._process.poll()

    def new_lines(self) -> list[str]:
        """Return the complete lines that the command has written since the last call."""
        lines, self._position = read_lines(self._log, self._position)
        return lines

    def wait(self, seconds: float) -> None:
        """Wait until the command has ended, at most some seconds."""
        with suppress(psutil.TimeoutExpired):
            self._process.wait(seconds)

    def stop(self) -> None:
        """Ask the command to end, wait, and kill what remains. A second interruption kills at once."""
        family: list[psutil.Process] = [self._process]
        with suppress(psutil.NoSuchProcess):
            family += self._process.children(recursive=True)
            self._process.terminate()
        try:
            self.wait(_SECONDS_TO_END)
        finally:
            send_signal(family, signal.SIGKILL)
            self._process.wait()


def read_lines(path: Path, position: int = 0) -> tuple[list[str], int]:
    """Return the complete lines of a file from a position in bytes on, and the position after these lines."""
    with open(path, "rb") as stream:
        stream.seek(position)
        data = stream.read()
    complete = data[: data.rfind(b"\n") + 1]
    return complete.decode("utf-8", errors="replace").splitlines(), position + len(complete)


def read_log(path: Path) -> list[str]:
    """Return all complete lines of a log; an empty list if the log does not exist."""
    return read_lines(path)[0] if path.exists() else []
