"""Runs torchrun: hands signals on once, ends a run that must not be restarted, and tells how the ranks ended."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from maskmoe.child_process import adopt_orphans, end_with_parent
from maskmoe.interruption import EXIT_CODE_FILE, EXIT_REQUEUE, SIGNALS_THAT_END, read_exit_code
from maskmoe.launch.command import Command

_POLL = 0.2  # seconds
_INSPECTION = 5.0  # seconds between looks at torchrun
_UNNOTICED = 60.0  # seconds that torchrun, which looks after its ranks all the time, may not notice that one has ended


class Supervisor:
    """Runs torchrun's command.

    Torchrun's own exit code says only that some rank failed; so ranks that end with a code after which they must not be
    restarted leave it in a file. Torchrun has a session of its own: a signal to the process group, or Ctrl-C, gets to
    it through this process alone, and once. For ranks that outlive torchrun, this process waits.

    Args:
        shutdown_timeout: seconds that ranks have to end after a signal.
    """

    def __init__(self, shutdown_timeout: float):
        self._shutdown_timeout = shutdown_timeout
        self._signals: list[signal.Signals] = []
        self._ending_since: float | None = None
        self._inspected = self._sound = time.monotonic()

    def run(self, command: Command) -> int:
        """Run the command to its end.

        Returns:
            0: it is done. 75: it was asked to stop. 76: it stood still. 2: bad input. Any other: it failed.
        """
        adopt_orphans()
        with tempfile.TemporaryDirectory(prefix="maskmoe-launch-") as folder, self._receiving_signals():
            exit_file = Path(folder) / "exit-code"
            process = self._start(command, exit_file)
            self._follow(process, exit_file)
            self._end_orphans(killed=process.returncode < 0)
            return self._verdict(process.returncode, read_exit_code(exit_file))

    @contextmanager
    def _receiving_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._receive) for number in SIGNALS_THAT_END}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._signals.append(signal.Signals(number))

    def _start(self, command: Command, exit_file: Path) -> subprocess.Popen:
        return subprocess.Popen(
            command.words,
            env={**os.environ, **command.environment, EXIT_CODE_FILE: str(exit_file)},
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )

    def _follow(self, process: subprocess.Popen, exit_file: Path) -> None:
        while process.poll() is None:
            if self._ending_since is None and (self._signals or exit_file.exists()):
                if self._signals:
                    print(f"launch: {self._signals[0].name}: the run saves a checkpoint and ends", file=sys.stderr)
                process.terminate()
                self._ending_since = time.monotonic()
            if self._signals.count(signal.SIGINT) > 1:
                print("launch: a second Ctrl-C: the run is killed", file=sys.stderr)
                _kill(psutil.Process().children(recursive=True))
            if self._is_stuck(process.pid):
                print(
                    "error: torchrun takes no notice of a rank that has ended, as when the network to node 0 is gone: "
                    "it is killed",
                    file=sys.stderr,
                )
                process.kill()
            try:
                process.wait(_POLL)
            except subprocess.TimeoutExpired:
                continue

    def _is_stuck(self, torchrun: int) -> bool:
        """Whether torchrun waits for an answer of its store that never comes, for which it has no time limit.

        After a signal, ranks may end long before others that still save.
        """
        now = time.monotonic()
        if self._signals and self._ending_since is not None:
            return now - self._ending_since > self._shutdown_timeout + _UNNOTICED
        if now - self._inspected >= _INSPECTION:
            self._inspected = now
            if not any(_is_zombie(child) for child in psutil.Process(torchrun).children()):
                self._sound = now
        return self._inspected - self._sound > _UNNOTICED

    def _end_orphans(self, killed: bool) -> None:
        """Wait for ranks that torchrun has left behind, as it does when it is killed or signalled repeatedly."""
        orphans = psutil.Process().children(recursive=True)
        if killed:
            for orphan in orphans:
                with suppress(psutil.NoSuchProcess):
                    orphan.terminate()
        _, alive = psutil.wait_procs(orphans, timeout=self._shutdown_timeout)
        _kill(alive)

    def _verdict(self, torchrun_code: int, rank_code: int | None) -> int:
        if torchrun_code == 0 or rank_code is not None:
            return rank_code or 0
        if self._signals:
            print(
                "launch: the run ended without a new checkpoint; started again it goes on from the one before",
                file=sys.stderr,
            )
            return EXIT_REQUEUE
        return torchrun_code if torchrun_code > 0 else 128 - torchrun_code


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
