"""Runs one node's ranks under torchrun, forwards signals to them, and records the start and the end of the run."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import psutil

from maskmoe.arguments.flags import flag_words
from maskmoe.errors import counted, refused_by_system
from maskmoe.files.run_folder import Journal, Kind
from maskmoe.launch.command import (
    RUN_ENVIRONMENT,
    Command,
    entry_point,
    split_program,
    torchrun_command,
    unset_variables,
)
from maskmoe.launch.machine import route_to
from maskmoe.launch.model_file import Flags
from maskmoe.launch.options import Meeting, Options
from maskmoe.processes.interruption import (
    EXIT_CODE_FILE,
    EXIT_HANG,
    EXIT_REQUEUE,
    handle_signals_that_end,
    read_exit_code,
)
from maskmoe.processes.lifetimes import adopt_orphans, end_with_parent, is_alive, send_signal
from maskmoe.processes.run_tool import EXIT_BAD_INPUT

_POLL_INTERVAL = 0.2  # seconds
_INSPECTION_INTERVAL = 5.0  # seconds between inspections of torchrun's children
_HANG_TIMEOUT = 60.0  # seconds within which torchrun must notice that a rank has exited
_ENDS = {
    0: "the training is complete",
    EXIT_BAD_INPUT: "the ranks refused their settings or files",
    EXIT_REQUEUE: "the run stopped on request",
    EXIT_HANG: "the run hung",
}


class Supervisor:
    """Runs torchrun's command and waits for all of its ranks.

    Torchrun's own exit code says only that some rank failed. So a rank that must not be restarted writes its exit code
    to a file, which the supervisor reads. Torchrun runs in its own session, so that a signal to the process group, or
    Ctrl-C, reaches torchrun only through the supervisor, and only once.

    Args:
        shutdown_timeout: How long ranks may take to exit after a signal, in seconds.
        saves_checkpoints: Whether ranks save a checkpoint when a signal stops them. Otherwise a signal cannot be
            answered by the exit code that asks for a restart.
    """

    def __init__(self, shutdown_timeout: float, saves_checkpoints: bool = True) -> None:
        self._shutdown_timeout = shutdown_timeout
        self._saves_checkpoints = saves_checkpoints
        self._signals: list[signal.Signals] = []
        self._stopping_since: float | None = None
        self._last_inspection = self._last_sound_inspection = time.monotonic()

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return bool(self._signals)

    def listen(self) -> None:
        """Note signals that ask this process to stop, instead of being ended by them."""
        handle_signals_that_end(lambda number, _: self._signals.append(signal.Signals(number)))

    def run(self, command: Command, must_end: Callable[[], bool] = lambda: False) -> int:
        """Run the command until it and all of its ranks have exited.

        Signals are noted from now on, also after the command has ended. So afterwards this process must exit, or ask
        `is_stopped`.

        Args:
            command: Torchrun's command line.
            must_end: Is asked again and again. When it returns true, all processes of the command are killed.

        Returns:
            0 if the command succeeded, 2 for bad input, 75 if a signal stopped the run, 76 if the run hung, and any
            other code if the run failed.
        """
        adopt_orphans()
        self.listen()
        self._stopping_since = None
        self._last_inspection = self._last_sound_inspection = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="maskmoe-launch-") as folder:
            exit_file = Path(folder) / "exit-code"
            process = psutil.Popen(
                command.words,
                env={**os.environ, **command.environment, EXIT_CODE_FILE: str(exit_file)},
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
            )
            code = self._follow(process, exit_file, must_end)
            self._end_orphans(killed=code < 0)
            return self._exit_code(code, read_exit_code(exit_file))

    def _follow(self, process: psutil.Popen, exit_file: Path, must_end: Callable[[], bool]) -> int:
        """Wait for torchrun, and stop it after a signal, after a rank's final exit code, or when it hangs.

        When `must_end` returns true, torchrun and all ranks are killed.

        Returns:
            Torchrun's exit code; negative if a signal ended torchrun.
        """
        while (code := process.poll()) is None:
            # The code 0 says that the training is complete: the ranks are about to exit.
            if self._stopping_since is None and (self._signals or read_exit_code(exit_file)):
                if self._signals:
                    action = "saves a checkpoint and stops" if self._saves_checkpoints else "stops"
                    say(f"{self._signals[0].name}: the run {action}", sys.stderr)
                process.terminate()
                self._stopping_since = time.monotonic()
            if self._signals.count(signal.SIGINT) > 1:
                say("second Ctrl-C: the run is killed", sys.stderr)
                send_signal(psutil.Process().children(recursive=True), signal.SIGKILL)
            if must_end():
                send_signal(psutil.Process().children(recursive=True), signal.SIGKILL)
            if self._hangs(process):
                say(
                    "error: torchrun does not notice that a rank has exited, as when the network to node 0 is down: "
                    "torchrun is killed",
                    sys.stderr,
                )
                process.kill()
            with suppress(psutil.TimeoutExpired):
                process.wait(_POLL_INTERVAL)
        return code

    def _hangs(self, torchrun: psutil.Process) -> bool:
        """Return whether torchrun waits for an answer of its store that never comes.

        Torchrun has no time limit for its store. Torchrun hangs if an exited rank stays a zombie for too long. After a
        signal, zombies prove nothing, because some ranks exit long before other ranks have saved: only time counts.
        """
        now = time.monotonic()
        if self._signals and self._stopping_since is not None:
            return now - self._stopping_since > self._shutdown_timeout + _HANG_TIMEOUT
        if now - self._last_inspection >= _INSPECTION_INTERVAL:
            self._last_inspection = now
            if all(is_alive(child.pid) for child in torchrun.children()):
                self._last_sound_inspection = now
        return self._last_inspection - self._last_sound_inspection > _HANG_TIMEOUT

    def _end_orphans(self, killed: bool) -> None:
        """Wait for ranks that outlive torchrun, which happens if it is killed or receives several signals.

        Args:
            killed: Whether a signal ended torchrun, so that nobody has asked the ranks to stop.
        """
        orphans = psutil.Process().children(recursive=True)
        if killed:
            send_signal(orphans, signal.SIGTERM)
        _, alive = psutil.wait_procs(orphans, timeout=self._shutdown_timeout)
        send_signal(alive, signal.SIGKILL)

    def _exit_code(self, torchrun_code: int, rank_code: int | None) -> int:
        """Return the run's exit code from torchrun's exit code and the code that a rank wrote, if any."""
        if torchrun_code == 0 or rank_code is not None:
            return rank_code or 0
        if self._signals and not self._saves_checkpoints:
            return 128 + self._signals[0]
        if self._signals:
            say(
                "the run stopped without saving a new checkpoint; the next start resumes from the previous one",
                sys.stderr,
            )
            return EXIT_REQUEUE
        return torchrun_code if torchrun_code > 0 else 128 - torchrun_code


@dataclass(frozen=True)
class NodeRun:
    """One node's part of one start of the ranks.

    Attributes:
        options: The launcher's options.
        meeting: How this node meets the other nodes.
        flags: The flags of the ranks.
        processes: The number of ranks of this node.
        ranks: The number of ranks of all nodes.
        environment: Variables of the ranks, beside those that all runs have.
    """

    options: Options
    meeting: Meeting
    flags: Flags
    processes: int
    ranks: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> Command:
        """Torchrun's command line."""
        route = route_to(*self.meeting.endpoint) if self.meeting.endpoint else None
        command = torchrun_command(self.options, self.meeting, self.flags, self.processes, route, os.environ)
        return Command(command.words, {**command.environment, **self.environment})

    def train(self, supervisor: Supervisor, must_end: Callable[[], bool] = lambda: False) -> int:
        """Run the ranks to their end, and return the exit code of the run.

        Args:
            supervisor: Runs torchrun.
            must_end: See `Supervisor.run`.

        Raises:
            UserError: The run folder cannot be written.
        """
        command = self.command
        folder = self.options.log_folder(self.meeting.node_rank)
        with refused_by_system(f"cannot make {folder}", "choose another --run-dir"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "command.txt").write_text(f"{command}\n", encoding="utf-8")
        ranks = counted(self.processes, "rank")
        say(str(command) if "verbose" in self.flags else f"starting {ranks}; everything is in {self.options.run_dir}")
        nodes = self.meeting.nodes
        text = f"the launcher starts {counted(self.ranks, 'rank')} on {counted(nodes, 'node')}"
        self._journal.write(Kind.LAUNCHED, text, ranks=self.ranks, nodes=nodes)
        return supervisor.run(command, must_end)

    def record_end(self, exit_code: int) -> None:
        """Write into the run's journal that the run has ended with an exit code."""
        text = _ENDS.get(exit_code, f"the run failed with exit code {exit_code}")
        self._journal.write(Kind.ENDED, text, exit_code=exit_code)

    @property
    def _journal(self) -> Journal:
        """The journal, in which the first node writes for all nodes, so that it has each start once."""
        return Journal(None if self.meeting.node_rank else self.options.run_dir)


def check(flags: Flags, ranks: int, shows_report: bool = True) -> int:
    """Check the run, which prints errors to stderr and a report to stdout; return the exit code.

    Args:
        flags: The flags of the run.
        ranks: The number of ranks of the run.
        shows_report: Whether to print the report, or only the errors.
    """
    program, flags = split_program(flags)
    words = (sys.executable, *entry_point("check", program), "--check", str(ranks), *flag_words(flags))
    environment = {**os.environ, **unset_variables(RUN_ENVIRONMENT, os.environ)}
    stdout = None if shows_report else subprocess.DEVNULL
    return subprocess.run(words, env=environment, stdout=stdout, check=False).returncode


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line of the launcher at once, by default to stdout; it is lost on a full disk or without a terminal."""
    with suppress(OSError):
        print(f"launch: {text}", file=stream, flush=True)
