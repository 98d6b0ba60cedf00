"""Run the command of a stage with its output in a log, and stop the command together with all its processes."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from maskmoe.child_process import end_with_parent, send_signal
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
            self._log = LogTail(log, output.tell())
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

    def new_lines(self) -> Iterator[str]:
        """Yield the complete lines that the command has written since the last call."""
        return self._log.new_lines()

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


class LogTail:
    """Reads the lines that are appended to a file.

    Args:
        path: the file.
        offset: position in bytes at which reading begins.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self._offset = offset

    def new_lines(self) -> Iterator[str]:
        """Yield the complete lines that were appended since the last call, without line ends."""
        with open(self._path, "rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        yield from complete.decode("utf-8", errors="replace").splitlines()


def read_log(path: Path) -> list[str]:
    """Return all complete lines of a log; an empty list if the log does not exist."""
    return list(LogTail(path).new_lines()) if path.exists() else []
