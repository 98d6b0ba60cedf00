"""Runs the command of a stage, with its output in a log, and ends it with everything it has started."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from maskmoe.child_process import end_with_parent
from maskmoe.workflow.lock import RunLock

_SECONDS_TO_END = 45.0  # torchrun gives its workers 30


class StageProcess:
    """A command at work.

    It ends when this process does, however that comes about (on Linux).

    Args:
        command: program and arguments.
        environment: variables in addition to those of this process.
        log: file to which the output is appended.
        lock: of the run folder, which all processes of the command hold too.
        folder: to run in.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, lock: RunLock, folder: Path
    ) -> None:
        self._lock = lock
        with open(log, "ab") as output:
            self._log = LogTail(log, output.tell())
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                # torchrun's workers inherit the standard streams only, so one of them carries the lock.
                stdin=lock.descriptor,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process alone, which then ends the command in good order.
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._process.poll()

    def new_lines(self) -> Iterator[str]:
        """Whole lines that it has written since the last call."""
        return self._log.new_lines()

    def wait(self, seconds: float) -> None:
        """Until it has ended, or for some time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def stop(self) -> None:
        """Ask it to end, wait for that, and kill what is left then, or at once at a second interruption."""
        family = self._family()
        self._process.terminate()
        try:
            self.wait(_SECONDS_TO_END)
        finally:
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            self.clear_up()

    def clear_up(self) -> None:
        """When it has ended: end what it has left, as it does if it was killed."""
        self._lock.kill_other_holders()

    def _family(self) -> set[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return {process, *process.children(recursive=True)}
        except psutil.NoSuchProcess:
            return set()


class LogTail:
    """Reads the lines that are added to a file.

    Args:
        path: the file.
        offset: where to begin.
    """

    def __init__(self, path: Path, offset: int = 0):
        self._path = path
        self._offset = offset

    def new_lines(self) -> Iterator[str]:
        """Whole lines added since the last call, without their ends."""
        with open(self._path, "rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        yield from whole.decode("utf-8", errors="replace").splitlines()
