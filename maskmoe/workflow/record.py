"""Record which stages are finished, with which commands and from which files."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maskmoe.workflow.json_records import read_record, write_record
from maskmoe.workflow.stage import Stage


@dataclass(frozen=True)
class StageRecord:
    """The record of one stage that was started.

    Attributes:
        command: program and arguments.
        inputs: digest of the input files' names, sizes and modification times, see `files_digest`.
        outputs: the same digest of the output files; None until the stage is finished.
        seconds: duration of the stage over all its starts.
    """

    command: tuple[str, ...]
    inputs: str
    outputs: str | None
    seconds: float

    @property
    def is_finished(self) -> bool:
        """Whether the stage has been finished."""
        return self.outputs is not None


@dataclass(frozen=True)
class _RecordFile:
    """Content of the record file."""

    stages: dict[str, StageRecord] = field(default_factory=dict)


class RunRecord:
    """The records of all stages of a folder, kept in a file.

    Args:
        path: the file, which need not exist.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        advice = "delete the file to start from the first stage"
        content = read_record(_RecordFile, path, advice) if path.exists() else _RecordFile()
        self._stages = content.stages

    def __contains__(self, name: str) -> bool:
        return name in self._stages

    def __getitem__(self, name: str) -> StageRecord:
        return self._stages[name]

    def reason_to_repeat(self, stage: Stage) -> str | None:
        """Return why the files of the stage's earlier start cannot be used; None if they can, or if there are none.

        The outputs of a stage that was started but not finished are not judged.
        """
        record = self._stages.get(stage.name)
        if record is None:
            return None
        old, new = (_settings(command, stage.machine_flags) for command in (record.command, stage.command))
        if old != new:
            return f"its settings changed ({describe_change(old, new)})"
        if record.inputs != files_digest(stage.inputs):
            return "its input changed"
        if record.is_finished and record.outputs != files_digest(stage.outputs):
            return "its output was changed or removed"
        return None

    def is_started(self, stage: Stage) -> bool:
        """Return whether the stage was started, with its present command or another."""
        return stage.name in self

    def is_finished(self, stage: Stage) -> bool:
        """Return whether the stage was finished and neither its command nor its files have changed since."""
        record = self._stages.get(stage.name)
        return record is not None and record.is_finished and self.reason_to_repeat(stage) is None

    def begin(self, stage: Stage) -> None:
        """Record that the stage starts from nothing. Call before the stage writes its first output."""
        self._set(stage, StageRecord(stage.command, files_digest(stage.inputs), None, 0.0))

    def pause(self, stage: Stage, seconds: float) -> None:
        """Record that the stage ran for some seconds and ended before it was finished."""
        record = self._stages[stage.name]
        self._set(stage, replace(record, seconds=record.seconds + seconds))

    def finish(self, stage: Stage, seconds: float) -> None:
        """Record that the stage has made all its outputs, after some more seconds."""
        record = self._stages[stage.name]
        self._set(stage, replace(record, outputs=files_digest(stage.outputs), seconds=record.seconds + seconds))

    def _set(self, stage: Stage, record: StageRecord) -> None:
        self._stages[stage.name] = record
        write_record(_RecordFile(self._stages), self.path, indent=2)


def files_digest(paths: Iterable[Path]) -> str:
    """Return the sha256 (hex) of names, sizes and modification times of files, and of all files in folders."""
    signatures = [_signature(path) for path in paths]
    return hashlib.sha256(json.dumps(signatures).encode()).hexdigest()


def _signature(path: Path) -> list[Any]:
    if path.is_dir():
        return [os.fspath(path), *(_signature(child) for child in sorted(path.iterdir()))]
    try:
        status = path.stat()
    except FileNotFoundError:
        return [os.fspath(path), None]
    return [os.fspath(path), status.st_size, status.st_mtime_ns]


def describe_change(old: Sequence[str], new: Sequence[str]) -> str:
    """Describe which flags differ between two command lines, with their old and new values."""
    old_flags, new_flags = _flags(old), _flags(new)
    changes = [
        f"{flag}: {old_flags.get(flag, 'not given')} → {new_flags.get(flag, 'not given')}"
        for flag in {**old_flags, **new_flags}
        if old_flags.get(flag) != new_flags.get(flag)
    ]
    return ", ".join(changes)


def _settings(command: Sequence[str], machine_flags: Collection[str]) -> list[str]:
    """Return a command line from its first flag on, without the folders of paths and the flags that fit the machine.

    The words before the first flag name the program, which the stage's name determines. The digests of the stage's
    files cover the folders.
    """
    settings: list[str] = []
    is_setting = False
    for word in command:
        if word.startswith("--") or (is_setting and word.startswith("-")):
            is_setting = word.partition("=")[0] not in machine_flags
        if is_setting:
            settings.append(word if word.startswith("-") else word.rpartition("/")[2])
    return settings


def _flags(command: Sequence[str]) -> dict[str, str]:
    """Return the values of each flag; the words before the first flag are the values of `command`."""
    flags: dict[str, list[str]] = {"command": []}
    values = flags["command"]
    for word in command:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values = flags[flag] = [value] if value else []
        else:
            values.append(word)
    return {flag: " ".join(values) for flag, values in flags.items()}
