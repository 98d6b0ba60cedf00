"""Remembers which stages are finished, and from what they were made."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError
from maskmoe.workflow.stage import Stage


@dataclass(frozen=True)
class StageRecord:
    """What is known of a stage that was started.

    Attributes:
        command: program and arguments.
        inputs, outputs: digests of their files' names, sizes and times (see `files_digest`); `outputs` is None until
            the stage is finished.
        seconds: how long it has taken, over all its starts.
    """

    command: tuple[str, ...]
    inputs: str
    outputs: str | None
    seconds: float

    @property
    def is_finished(self) -> bool:
        return self.outputs is not None


class RunRecord:
    """The records of all stages, kept in a file.

    Args:
        path: the file; need not exist.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stages: dict[str, StageRecord] = {}
        if path.exists():
            try:
                stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
                self._stages = {name: _stage_record(values) for name, values in stages.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path} is damaged ({error}); delete it to start from the first stage") from error

    def __contains__(self, name: str) -> bool:
        return name in self._stages

    def __getitem__(self, name: str) -> StageRecord:
        return self._stages[name]

    def reason_to_redo(self, stage: Stage) -> str | None:
        """Why what an earlier start of the stage left is of no use; None if it is, or if there was none.

        A stage that was started and not finished has no output to judge yet.
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
        """Whether it was begun, in its present form or another."""
        return stage.name in self

    def is_finished(self, stage: Stage) -> bool:
        """Whether the stage was finished, and nothing has changed since."""
        record = self._stages.get(stage.name)
        return record is not None and record.is_finished and self.reason_to_redo(stage) is None

    def begin(self, stage: Stage) -> None:
        """Note that the stage starts from nothing, before its first output is written."""
        self._stages[stage.name] = StageRecord(stage.command, files_digest(stage.inputs), None, 0.0)
        self._save()

    def pause(self, stage: Stage, seconds: float) -> None:
        """Note that the stage was at work and has ended before it was finished."""
        record = self._stages[stage.name]
        self._stages[stage.name] = replace(record, seconds=record.seconds + seconds)
        self._save()

    def finish(self, stage: Stage, seconds: float) -> None:
        """Note that the stage has made all its outputs."""
        record = self._stages[stage.name]
        outputs = files_digest(stage.outputs)
        self._stages[stage.name] = replace(record, outputs=outputs, seconds=record.seconds + seconds)
        self._save()

    def _save(self) -> None:
        stages = {name: asdict(record) for name, record in self._stages.items()}
        with atomic_output(self.path) as path:
            path.write_text(json.dumps({"stages": stages}, indent=2) + "\n", encoding="utf-8")


def _stage_record(values: dict[str, Any]) -> StageRecord:
    return StageRecord(**(values | {"command": tuple(values["command"])}))


def files_digest(paths: Iterable[Path]) -> str:
    """sha256 (hex) over names, sizes and modification times of the files, and of all files in the folders."""
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
    """Which flags differ between two command lines, with their values."""
    old_flags, new_flags = _flags(old), _flags(new)
    changes = [
        f"{flag}: {old_flags.get(flag, 'not given')} → {new_flags.get(flag, 'not given')}"
        for flag in {**old_flags, **new_flags}
        if old_flags.get(flag) != new_flags.get(flag)
    ]
    return ", ".join(changes)


def _settings(command: Sequence[str], machine_flags: Collection[str]) -> list[str]:
    """A command line without what depends on the machine: those flags, and the program, which is Python."""
    kept, is_setting = [], True
    for word in command[1:]:
        if word.startswith("-"):
            is_setting = word.partition("=")[0] not in machine_flags
        if is_setting:
            kept.append(word)
    return kept


def _flags(command: Sequence[str]) -> dict[str, str]:
    """Values of each flag; the words before the first one count as those of `command`."""
    flags: dict[str, list[str]] = {"command": []}
    values = flags["command"]
    for word in command:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values = flags[flag] = [value] if value else []
        else:
            values.append(word)
    return {flag: " ".join(values) for flag, values in flags.items()}
