"""Record which stages are finished, with which commands and from which files."""

import hashlib
import json
import os
from collections import UserDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maskmoe.files.json_files import read_record, write_record
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


class RunRecord(UserDict[str, StageRecord]):
    """The records of all started stages of a folder by name, kept in a file.

    Args:
        path: the file, which need not exist.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if path.exists():
            self.data = read_record(_RecordFile, path, "delete the file to start from the first stage").stages

    def __setitem__(self, key: str, item: StageRecord) -> None:
        super().__setitem__(key, item)
        write_record(_RecordFile(self.data), self.path, indent=2)

    def reason_to_repeat(self, stage: Stage) -> str | None:
        """Return why the files of the stage's earlier start cannot be used; None if they can, or if there are none.

        The outputs of a stage that was started but not finished are not judged.
        """
        record = self.get(stage.name)
        if record is None:
            return None
        if change := describe_change(record.command, stage.command, stage.machine_flags):
            return f"its settings changed ({change})"
        if record.inputs != files_digest(stage.inputs):
            return "its input changed"
        if record.is_finished and record.outputs != files_digest(stage.outputs):
            return "its output was changed or removed"
        return None

    def is_finished(self, stage: Stage) -> bool:
        """Return whether the stage was finished and neither its command nor its files have changed since."""
        return stage.name in self and self[stage.name].is_finished and self.reason_to_repeat(stage) is None

    def begin(self, stage: Stage) -> None:
        """Record that the stage starts from nothing. Call before the stage writes its first output."""
        self[stage.name] = StageRecord(stage.command, files_digest(stage.inputs), None, 0.0)

    def pause(self, stage: Stage, seconds: float) -> None:
        """Record that the stage ran for some seconds and ended before it was finished."""
        record = self[stage.name]
        self[stage.name] = replace(record, seconds=record.seconds + seconds)

    def finish(self, stage: Stage, seconds: float) -> None:
        """Record that the stage has made all its outputs, after some more seconds."""
        record = self[stage.name]
        self[stage.name] = replace(record, outputs=files_digest(stage.outputs), seconds=record.seconds + seconds)


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


def describe_change(old: Sequence[str], new: Sequence[str], machine_flags: Collection[str] = ()) -> str:
    """Describe which flags differ between two command lines, with their old and new values; "" if none differs.

    Args:
        old: program and arguments.
        new: program and arguments.
        machine_flags: names of flags that adapt the command to the machine. A change of these flags does not count.
    """
    before, after = _settings(old), _settings(new)
    return ", ".join(
        f"{flag}: {before.get(flag, 'not given')} → {after.get(flag, 'not given')}"
        for flag in {**before, **after}
        if before.get(flag) != after.get(flag) and flag not in machine_flags
    )


def _settings(command: Sequence[str]) -> dict[str, str]:
    """Return the values of each flag of a command line, without the folders of paths.

    The words before the first flag name the program, which the stage's name determines. The digests of the stage's
    files cover the folders.
    """
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values = flags[flag] = [value] if value else []
        else:
            values.append(word.rpartition("/")[2])
    return {flag: " ".join(values) for flag, values in flags.items()}
