"""Starts training processes within milliseconds: they are forks of a process that has imported what training imports.

Importing PyTorch and Megatron-Core takes 4 seconds of each process, which is most of the time of a short run. The forks
are processes like others: they join their group over gloo, get signals and have exit codes. Unlike processes of
torchrun, they share the seed of string hashes, and see the environment variables only after the imports.
"""

import json
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import IO

from support import fork_server


class ForkedProcess:
    """A process of `PreloadedPython`, with what `subprocess.Popen` has of this name.

    Args:
        answer: the socket to which the server writes the process id and, at the end, the exit code.

    Attributes:
        pid: process id, and id of the process's group.
        returncode: exit code; negative if a signal ended the process; None before `poll` or `wait` has seen the end.
    """

    def __init__(self, answer: socket.socket) -> None:
        self._lines = answer.makefile()
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None if the process has not ended."""
        if self.returncode is None and select.select([self._lines], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait until the process has ended, and return the exit code."""
        if self.returncode is None:
            self.returncode = int(self._lines.readline())
            self._lines.close()
        return self.returncode


class PreloadedPython:
    """Runs programs in forks of a process that has imported what training imports. It ends with this process.

    Args:
        environment: variables of the process while it imports.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = Lock()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, fork_server.__file__, str(theirs.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(
        self,
        program: Sequence[str],
        working_folder: Path,
        environment: Mapping[str, str],
        out: IO[str],
        err: IO[str],
    ) -> ForkedProcess:
        """Start `python PROGRAM…`.

        Args:
            program: Python's arguments: `-m MODULE ARGUMENTS…`, or `SCRIPT ARGUMENTS…`.
            working_folder: working directory of the process.
            environment: all variables of the process.
            out: file of standard output.
            err: file of standard error.
        """
        request = fork_server.Request([*program], str(working_folder), {**environment})
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptors = [theirs.fileno(), out.fileno(), err.fileno()]
            with self._lock:
                socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
            theirs.close()  # so that the end of the server ends the wait for its answer
            return ForkedProcess(ours)
