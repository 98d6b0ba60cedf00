"""Helpers around the system: waiting, lives of processes, limits on open files, locks, signals, scripts."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import pytest

from maskmoe.processes.interruption import Handler
from maskmoe.processes.signals import SIGNALS_THAT_END


def wait_until(
    condition: Callable[[], object],
    what: str = "the condition",
    *,
    timeout: float = 120,
    period: float = 0.05,
    has_ended: Callable[[], bool] = lambda: False,
    report: Callable[[], str] = lambda: "",
) -> None:
    """Return as soon as `condition()` is true; fail the test if that takes too long.

    Args:
        condition: Called every `period` seconds.
        what: Names the condition in the failure's message.
        timeout: Seconds after which the test fails.
        period: Seconds between two calls of `condition`.
        has_ended: Whether the condition can no longer become true, for example because the process under test ended.
        report: Returns the text that the failure's message ends with.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        # The order matters: the condition may have become true just before the end.
        if has_ended() and not condition():
            pytest.fail(f"the process ended before {what}\n{report()}")
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s in vain for {what}\n{report()}")
        time.sleep(period)


@contextmanager
def few_open_files(further: int = 12) -> Iterator[None]:
    """Allow this process, during the block, only `further` open files in addition to the open ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in count() if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, further, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


HANDLERS: dict[signal.Signals, Handler] = dict.fromkeys(SIGNALS_THAT_END, signal.SIG_DFL)
HANDLERS[signal.SIGINT] = signal.default_int_handler


def install_handlers() -> None:
    """Install the handlers of `HANDLERS`."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def write_script(path: Path, text: str) -> Path:
    """Write an executable file and the folder that holds it; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run_maskmoe(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `maskmoe WORDS…` as a process in the folder `cwd` and return its exit code and output."""
    command = [sys.executable, "-P", "-m", "maskmoe", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
