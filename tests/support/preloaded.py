"""Starts training processes within milliseconds: they are forks of a process that has imported what training imports.

Importing PyTorch, Megatron-Core and transformers takes 5 seconds of each process, which is most of the time of a short
run. The forks are processes like others: they join their group over gloo, get signals and have exit codes. Unlike
processes of torchrun, they share the seed of string hashes, and see the environment variables only after the imports.

    python preloaded.py SOCKET

is the process that forks. SOCKET is the descriptor of a Unix socket of packets. A packet is a request in JSON, with the
descriptors of a socket for the answer, of standard output and of standard error. The answer has two lines: the process
id, and the exit code.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Never

import psutil

SIGNAL_OF_STACKS = signal.SIGPROF
MAX_BYTES = 2**17
"""The largest size of a request."""


class Request(NamedTuple):
    """A Python process.

    Attributes:
        program: Python's arguments: `-m MODULE ARGUMENTS…`, or `SCRIPT ARGUMENTS…`.
        working_folder: The working directory.
        environment: All environment variables.
    """

    program: list[str]
    working_folder: str
    environment: dict[str, str]


class ForkedProcess:
    """A process of `PreloadedPython`, with what `subprocess.Popen` has of this name.

    Args:
        answer: The socket to which the server writes the process id and, at the end, the exit code.

    Attributes:
        pid: Process id, and id of the process's group.
        returncode: Exit code; negative if a signal ended the process; None before `poll` or `wait` has seen the end.
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
        environment: Variables of the process while it imports.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
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
            working_folder: Working directory of the process.
            environment: All variables of the process.
            out: File of standard output.
            err: File of standard error.
        """
        request = Request([*program], str(working_folder), {**environment})
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptors = [theirs.fileno(), out.fileno(), err.fileno()]
            with self._lock:
                socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
            theirs.close()  # so that the end of the server ends the wait for its answer
            return ForkedProcess(ours)


def import_training() -> None:
    """Import what a training run imports before its first step."""
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    # Megatron-Core imports transformers with its tokenizers, and torch its compiler with the first optimizer.
    for name in (
        "maskmoe.training.preflight.inspection",
        "maskmoe.training.trainer",
        "megatron.core.tokenizers.text",
        "torch._dynamo",
    ):
        importlib.import_module(name)

    # A fork has no other thread than the one that forks.
    assert psutil.Process().num_threads() == 1
    # Collections of garbage in forks do not write to, and so copy, the pages of what is imported.
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> Request | None:
    """Fork a process for each request. Return its request in such a process, and None when the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes watchers that have ended
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_BYTES, 3)
        if not message:
            return None
        if os.fork() == 0:
            requests.close()
            return start(Request(*json.loads(message)), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def start(request: Request, answer: int, out: int, err: int) -> Request:
    """Fork the process of a request, in which this function returns. The calling process waits for its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (process := os.fork()) == 0:
        become(request, out, err)
        os.close(answer)
        return request
    os.close(out)
    os.close(err)
    os.setpgid(process, process)  # The process does so, too: neither may be late.
    os.write(answer, f"{process}\n".encode())
    _, status = os.waitpid(process, 0)
    os.write(answer, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(request: Request, out: int, err: int) -> None:
    """Give this process a group of its own, and the output, folder and variables of a request."""
    os.setpgid(0, 0)
    for source, target in ((out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request.working_folder)
    os.environ.clear()
    os.environ.update(request.environment)


def run(program: list[str]) -> Never:
    """Run a program as Python does with these arguments, and end this process with the program's exit code.

    A crash and `SIGNAL_OF_STACKS` write all threads' stacks. Threads and exit handlers end as at the end of Python;
    imported objects are not destroyed, which would take a second.
    """
    code = 0
    try:
        run_main(program)
    except SystemExit as end:
        code = exit_code(end)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    # Python's finalization does the same, and makes an error of a stream its exit code 120.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(end: SystemExit) -> int:
    """Return the exit code of `sys.exit`, and write its message."""
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def run_main(program: list[str]) -> None:
    """Run a program's module or script as `__main__`."""
    faulthandler.enable()
    faulthandler.register(SIGNAL_OF_STACKS)
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in folders if folder and folder not in sys.path]
    if program[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv[1:] = program[2:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).resolve().parent)
        sys.argv[1:] = program[1:]
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    import_training()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        os._exit(0)
    run(request.program)
