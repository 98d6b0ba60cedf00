"""The steps of a comparison: commands that a user could type, each of which runs once in a folder."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from maskmoe.errors import RunFailure, UserError
from maskmoe.files.json_files import read_record, write_record
from maskmoe.files.outputs import write_text
from maskmoe.files.paths import short_path
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.processes.interruption import end_with_parent

_RECORD = "done.json"
_ERROR = re.compile(r"error: (.+)")


def maskmoe_command(*words: object) -> tuple[str, ...]:
    """Return the command line of a subcommand of `maskmoe`, run by this Python."""
    return (sys.executable, "-P", "-m", "maskmoe", *map(str, words))


@dataclass(frozen=True)
class Step:
    """A command, the file or folder that exists once it has succeeded, and variables that it needs."""

    name: str
    command: tuple[str, ...]
    result: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Record:
    """The settings that a folder was made for, and the command line of each step that is done."""

    settings: Any
    done: dict[str, list[str]]

    def has_done(self, step: Step) -> bool:
        # Another Python, as in a container, repeats nothing.
        return self.done.get(step.name) == [*step.command[1:]] and step.result.exists()


async def run_steps(
    folder: Path, settings: Any, steps: Sequence[Step], files: Mapping[Path, str] | None = None
) -> None:
    """Run the steps that are not done in a folder, in order, and record them in `done.json`.

    A step is done if its command line was run for the same settings and its result exists.

    Args:
        folder: The folder.
        settings: What all files of the folder depend on, as JSON values.
        steps: The steps.
        files: Texts of files that the steps read.

    Raises:
        UserError: The folder has files of something else or of other settings, another process works there, or a step
            refused its input.
        RunFailure: A step failed.
    """
    path = folder / _RECORD
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() and (found := sorted(folder.iterdir())) and found != [folder / ".run.lock"]:
        raise UserError(
            f"{short_path(folder)} holds {found[-1].name}, which no comparison wrote; choose another --run-dir"
        )
    if all(map(_read(path, settings).has_done, steps)):
        return
    with locked_folder(folder, "--run-dir"):
        record = _read(path, settings)
        write_record(record, path)
        for file, text in (files or {}).items():
            write_text(file, text)
        for step in steps:
            if not record.has_done(step):
                print(f"{folder.name}: {step.name}", flush=True)
                await _run(step, folder / "logs" / f"{step.name}.log")
                record.done[step.name] = [*step.command[1:]]
                write_record(record, path)


def _read(path: Path, settings: Any) -> _Record:
    if not path.exists():
        return _Record(settings, {})
    remedy = f"remove {short_path(path.parent)} to begin again, or choose another --run-dir"
    record = read_record(_Record, path, remedy)
    if record.settings != settings:
        raise UserError(f"{short_path(path.parent)} was made with other settings or another text: {remedy}")
    return record


async def _run(step: Step, log: Path) -> None:
    """Run a command, and end it in good order if this task is cancelled: training saves a checkpoint."""
    log.parent.mkdir(exist_ok=True)
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        process = await asyncio.create_subprocess_exec(
            *step.command,
            # `python -m` would import the user's files of the current folder before the standard library.
            env={**os.environ, "PYTHONSAFEPATH": "1", **step.environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches only this process
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        output.seek(0)
        text = output.read()
    if code:
        errors = _ERROR.findall(text) or text.split("\n")[-2:-1] or ["no output"]
        reason = f"{step.name}: {errors[-1].strip()} (exit code {code}, full output: {short_path(log)})"
        raise UserError(reason) if code == 2 else RunFailure(reason)
    if not step.result.exists():
        raise RunFailure(f"{step.name} has not written {short_path(step.result)} (full output: {short_path(log)})")
