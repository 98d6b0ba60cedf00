"""Stages: commands that a user could type, each finished once however often the work is interrupted."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from shutil import get_terminal_size
from types import FrameType
from typing import NoReturn, TextIO

import psutil
from tqdm import tqdm

from maskmoe.errors import RunFailure, UserError, listed
from maskmoe.files.json_files import read_record, write_record
from maskmoe.files.outputs import check_outputs, refuse_checkpoint, write_text
from maskmoe.files.paths import short_path
from maskmoe.files.run_folder import ARGUMENTS, JOURNAL
from maskmoe.processes.interruption import SHUTDOWN_TIMEOUT, SIGNALS_THAT_END_TOOLS, deferring_signals, handling_signals
from maskmoe.processes.lifetimes import end_with_parent, send_signal

_SECONDS_TO_END = SHUTDOWN_TIMEOUT + 90.0  # a launcher needs some time of its own
_LAST_BYTES = 4096  # of a log, in which its last line is searched
_REFUSAL = re.compile(r"^(\[rank\d+\]:? )?(\S+( [\w-]+)?: )?error: (?P<message>.+)", re.MULTILINE)
_SECONDS_BETWEEN_LINES = 60.0
_CLEAR = "\r\x1b[K"

_STOPPING = (
    "\nstopping: the stage in progress ends first (train saves a checkpoint), or a second Ctrl-C kills it; the same "
    "command continues"
)

POLL_SECONDS = 0.2
"""How often the state of running commands is asked for."""


def maskmoe_command(*words: object) -> tuple[str, ...]:
    """Return the command line of a subcommand of `maskmoe`, run by this Python."""
    return (sys.executable, "-P", "-m", "maskmoe", *map(str, words))


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Until the block ends, let a signal that ends tools say what happens, and raise `SystemExit` with its exit code.

    Running stages are then stopped in good order, as by Ctrl-C. A second signal kills the stages.
    """
    is_stopping = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            # Python drops exceptions that are raised while it closes the iterators of several runs.
            send_signal(psutil.Process().children(recursive=True), signal.SIGKILL)
            return
        is_stopping = True
        with suppress(OSError):  # the terminal may be gone
            print(_STOPPING, file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    with handling_signals(SIGNALS_THAT_END_TOOLS, stop):
        yield


class StatusLine:
    """Shows the state of work: on a terminal on one line that is rewritten, elsewhere as a line every minute.

    Args:
        stream: Where to print.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._next = 0.0

    def update(self, state: str) -> None:
        """Show the state."""
        if self._is_terminal:
            print(f"{_CLEAR}{state[: get_terminal_size().columns - 1]}", end="", file=self._stream, flush=True)
        elif time.monotonic() >= self._next:
            print(state, file=self._stream, flush=True)
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def print(self, text: str) -> None:
        """Print lines that stay."""
        print(f"{_CLEAR if self._is_terminal else ''}{text}", file=self._stream, flush=True)


@dataclass(frozen=True)
class StageSettings:
    """The command of a stage, and the size and modification time of each of its inputs; None for a missing input."""

    command: Sequence[str]
    inputs: Mapping[str, Sequence[int] | None]


@dataclass(frozen=True)
class StageRecord:
    """The settings with which a stage was started, and its duration in seconds once it is finished."""

    settings: StageSettings
    seconds: float | None


@dataclass(frozen=True)
class Stage:
    """One command with the files that it reads and writes.

    Attributes:
        name: Name of the stage, unique in its folder.
        command: Program and arguments.
        results: Files and folders that exist when the command has succeeded.
        inputs: Files and folders that the command reads. The stage is repeated if one of them changes.
        byproducts: Other files and folders that the command writes. They are set aside together with the results.
        environment: Variables that are set in addition to those of this process.
        is_resumable: Whether the command resumes from the files of an interrupted command.
    """

    name: str
    command: tuple[str, ...]
    results: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    byproducts: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_resumable: bool = False

    def __str__(self) -> str:
        """Return a line that can be pasted into a shell."""
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])

    @property
    def settings(self) -> StageSettings:
        """The settings that the stage has now."""
        return StageSettings(list(self.command), {str(path): _version(path) for path in self.inputs})

    def has_settings(self, settings: StageSettings) -> bool:
        """Return whether recorded settings equal the stage's settings. The path of the program, Python, may differ."""
        # The login node begins a stage that a job of Slurm continues in a container, whose Python has another path.
        now = self.settings
        return settings.command[1:] == now.command[1:] and settings.inputs == now.inputs


def _version(path: Path) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


@dataclass(frozen=True)
class StageFolder:
    """The folder in which stages run.

    The folder `stages/` has a record of each stage: its settings and, once it is finished, its duration. `logs/` has
    the output of each command, and `commands.sh` all command lines.

    Attributes:
        path: The folder.
    """

    path: Path

    def log(self, stage: str) -> Path:
        """Return the file with the output of a stage."""
        return self.path / "logs" / f"{stage}.log"

    def check(self, files: Iterable[Path], inputs: Iterable[Path], is_own: bool = False) -> None:
        """Check `commands.sh` and further files that every start replaces; call this method before anything is written.

        Raises:
            UserError: The folder lies in a checkpoint. Or a file is one of the inputs, or exists although the folder
                has no stages and `is_own` is false: the file belongs to the user, or the folder to another run.
        """
        refuse_checkpoint(self.path)
        existing = [path for path in (self.path / "commands.sh", *files) if os.path.lexists(path)]
        check_outputs(existing, inputs, force=True)
        if is_own or (self.path / "stages").exists():
            return
        if existing:
            path = short_path(existing[0])
            raise UserError(f"cannot write {path}: it exists, but no run has written it; choose another --run-dir")
        if of_run := [name for name in (ARGUMENTS, JOURNAL, "checkpoints") if os.path.lexists(self.path / name)]:
            raise UserError(f"{short_path(self.path)} has the {of_run[0]} of another run; choose another --run-dir")

    def seconds(self, stage: Stage) -> float | None:
        """Return the duration of a finished stage; None if it is unfinished, or if its settings or results changed."""
        record = self._read(stage)
        return record.seconds if record and all(path.exists() for path in stage.results) else None

    def finish(self, stages: Sequence[Stage]) -> Generator[str]:
        """Run the unfinished stages in order; yield the state of the running stage again and again.

        The caller decides how often it asks. Closing the iterator stops the running command.

        Raises:
            UserError: A stage refused its input. RunFailure: a stage failed.
        """
        self._write_commands(stages)
        for stage in stages:
            if self.seconds(stage) is None:
                yield from self._run(stage)

    def run(self, stages: Sequence[Stage], line: StatusLine) -> None:
        """Run the unfinished stages in order like `finish`, and show their state and their durations."""
        self._write_commands(stages)
        for stage in stages:
            if self.seconds(stage) is not None:
                continue
            with closing(self._run(stage)) as work:
                for state in work:
                    line.update(state)
                    time.sleep(POLL_SECONDS)
            line.print(f"{stage.name} finished in {tqdm.format_interval(self.seconds(stage) or 0)}")

    def _write_commands(self, stages: Sequence[Stage]) -> None:
        (self.path / "stages").mkdir(parents=True, exist_ok=True)  # marks commands.sh as a file of the run, see `check`
        write_text(self.path / "commands.sh", "\n\n".join(["#!/bin/sh", *map(str, stages)]) + "\n")

    def begin(self, stage: Stage) -> None:
        """Record that a stage starts. Files that it cannot resume from are moved into `previous/`; a line says why."""
        if not (stage.is_resumable and self.has_begun(stage)):
            reason = self._reason_to_repeat(stage)
            if folder := self._set_aside((*stage.results, *stage.byproducts)):
                StatusLine(sys.stderr).print(
                    f"{stage.name}: {reason}; the earlier files are now in {short_path(folder)}"
                )
        self._write(stage, None)

    def end(self, stage: Stage, seconds: float) -> None:
        """Record that a stage is finished.

        Raises:
            RunFailure: A result is missing.
        """
        if missing := [path for path in stage.results if not path.exists()]:
            log = short_path(self.log(stage.name))
            raise RunFailure(f"{stage.name} has not written {short_path(missing[0])} (full output: {log})")
        self._write(stage, seconds)

    def has_begun(self, stage: Stage) -> bool:
        """Return whether a stage was started with the settings that it has now."""
        return self._read(stage) is not None

    def _run(self, stage: Stage) -> Generator[str]:
        """Run one stage."""
        self.begin(stage)
        log, start = self.log(stage.name), time.monotonic()
        log.parent.mkdir(exist_ok=True)
        first_byte = log.stat().st_size if log.exists() else 0
        process = None
        try:
            with deferring_signals():  # Python drops exceptions of handlers that run while a process forks
                process = _start(stage, log)
            while process.poll() is None:
                elapsed = tqdm.format_interval(time.monotonic() - start)
                yield f"{stage.name} {elapsed}  {_last_line(log, first_byte)}"
        finally:
            if process is not None:
                _stop(process)
        if process.returncode:
            _raise_failure(stage, log, first_byte, process.returncode)
        self.end(stage, time.monotonic() - start)

    def _reason_to_repeat(self, stage: Stage) -> str:
        """Return why the files of an earlier attempt do not count, for people."""
        record = self._record(stage)
        if record is None:
            return "this run folder has no record of the stage"
        earlier, inputs = record.settings, stage.settings.inputs
        if stage.has_settings(earlier):
            return "the stage was interrupted, or a result is missing"
        options = {*pairwise(stage.command)} - {*pairwise(earlier.command)}
        changed = sorted(f"{flag} {value}" for flag, value in options if flag.startswith("--") and value[:2] != "--")
        changed += [short_path(path) for path in inputs if inputs[path] != earlier.inputs.get(path)]
        return f"{listed(changed, 3) or 'the command line'} changed"

    def _set_aside(self, paths: Sequence[Path]) -> Path | None:
        """Move files and folders into a new folder of `previous/`; return the folder, None if no file exists."""
        if existing := [path for path in paths if os.path.lexists(path)]:
            folders = (self.path / "previous" / str(number) for number in count(1))
            folder = next(folder for folder in folders if not folder.exists())
            folder.mkdir(parents=True)
            for path in existing:
                path.rename(folder / path.name)
            return folder
        return None

    def _record_file(self, stage: Stage) -> Path:
        return self.path / "stages" / f"{stage.name}.json"

    def _read(self, stage: Stage) -> StageRecord | None:
        """Return the record of a stage; None if there is none, or if the settings of the stage have changed."""
        record = self._record(stage)
        return record if record and stage.has_settings(record.settings) else None

    def _record(self, stage: Stage) -> StageRecord | None:
        path, advice = self._record_file(stage), f"delete it to repeat the stage {stage.name}"
        return read_record(StageRecord, path, advice) if path.exists() else None

    def _write(self, stage: Stage, seconds: float | None) -> None:
        self._record_file(stage).parent.mkdir(exist_ok=True)
        write_record(StageRecord(stage.settings, seconds), self._record_file(stage))


def _start(stage: Stage, log: Path) -> psutil.Popen:
    """Start a command in the current folder. On Linux the command ends when this process ends, even if killed."""
    with open(log, "ab") as output:
        return psutil.Popen(
            stage.command,
            # `python -m` would import the user's files of the current folder before the standard library.
            env={**os.environ, "PYTHONSAFEPATH": "1", **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches only this process, which then stops the command in good order.
            process_group=0,
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )


def _stop(process: psutil.Popen) -> None:
    """Ask a command to end if it still runs, wait, and kill what remains of its processes."""
    if process.poll() is not None:
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    try:
        with suppress(psutil.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
    finally:
        send_signal(family, signal.SIGKILL)
        process.wait()


def _last_line(log: Path, first_byte: int) -> str:
    """Return the last complete line that a log has from a byte on."""
    with open(log, "rb") as stream:
        stream.seek(max(first_byte, log.stat().st_size - _LAST_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _raise_failure(stage: Stage, log: Path, first_byte: int, exit_code: int) -> NoReturn:
    """Raise an error with the reason why a command failed: the refusal of its input, else its last line.

    Args:
        stage: The stage.
        log: The output of the command.
        first_byte: Where the output of this attempt begins.
        exit_code: The exit code; negative for a signal.

    Raises:
        UserError: The command refused its input, by a line `error: …`.
        RunFailure: The command failed otherwise.
    """
    with open(log, encoding="utf-8", errors="replace") as stream:
        stream.seek(first_byte)
        text = stream.read()
    place = f"(full output: {short_path(log)})"
    if match := _REFUSAL.search(text):
        raise UserError(f"{stage.name}: {match['message']} {place}")
    last = (text.strip().splitlines() or ["no output"])[-1]
    raise RunFailure(f"{stage.name}: {last} (exit code {exit_code}) {place}")
