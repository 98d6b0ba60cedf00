"""The signals that stop a run, the exit codes of a stopped run, and steps that must not be interrupted."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS_THAT_SAVE = (signal.SIGTERM, signal.SIGUSR1)
"""The signals after which a rank saves a checkpoint: Slurm, Kubernetes and torchrun announce a stop by them."""

SIGNALS_THAT_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""The signals after which a launcher stops the run. The launcher sends `SIGTERM` to the ranks for each of them."""

SIGNALS_THAT_END_TOOLS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a command that is no training."""

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

SHUTDOWN_TIMEOUT = 600
"""The seconds for which a launcher waits, by default, for a last checkpoint after a signal."""

EXIT_REQUEUE = 75
"""A signal stopped the run, which saved a checkpoint and can resume. The code is `EX_TEMPFAIL` of sysexits.h."""

EXIT_HANG = 76
"""The run hung for longer than its limit, and stopped itself. It can resume, if possible on other nodes."""

EXIT_CODE_FILE = "MASKMOE_EXIT_CODE_FILE"
"""The environment variable with which a launcher names the file for `leave_exit_code`."""

LEAVE_FILE = "MASKMOE_LEAVE_FILE"
"""The environment variable with which a launcher names the file that asks the ranks to end after their next checkpoint.

The launcher makes the file when it wants to start the ranks again on more nodes."""


def handle_signals_that_end(handler: Callable[[int, FrameType | None], object]) -> None:
    """Call a handler for each of `SIGNALS_THAT_END` from now on; SIGHUP stays ignored under `nohup`."""
    for number in SIGNALS_THAT_END:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave_exit_code(code: int) -> None:
    """Write the exit code of a rank that must not be restarted to the launcher's file, if a launcher asks for it.

    The code 0 says that the training is complete on all ranks.

    Torchrun treats every exit code but 0 as a failure, restarts the ranks, and itself exits with 1. A code that cannot
    be written is lost without an error, because this process is about to end.
    """
    if path := os.environ.get(EXIT_CODE_FILE):
        unfinished = Path(f"{path}.{os.getpid()}")
        with suppress(OSError):
            unfinished.parent.mkdir(exist_ok=True)  # systems remove folders of /tmp that are some days old
            unfinished.write_text(str(code))
            unfinished.replace(path)


def is_last_attempt() -> bool:
    """Return whether torchrun will not restart this rank if it fails. True without torchrun."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return restarts >= max_restarts


def read_exit_code(path: Path) -> int | None:
    """Read the exit code that a rank wrote by `leave_exit_code`. Return None if no rank wrote any."""
    return int(path.read_text()) if path.exists() else None


@contextmanager
def handling_signals(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Handle signals by a handler until the block ends, then as before the block.

    An ignored signal stays ignored. Outside the main thread nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    # A handler that Python did not install (None) cannot be restored.
    before = {number: earlier for number, earlier in before.items() if earlier not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def deferring_signals() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block ends; then handle them as before the block.

    Use a short block: nothing reacts to Ctrl-C inside it. Do not block signals by the thread's mask: `multiprocessing`
    unblocks SIGINT and SIGTERM when it starts its resource tracker. Outside the main thread nothing changes.
    """
    received: list[int] = []
    try:
        with handling_signals(SIGNALS_THAT_END_TOOLS, lambda number, _frame: received.append(number)):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)
