"""Run the stages of a plan in order, each once, however often the work is interrupted."""

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.workflow.failure import Failure, explain_failure
from maskmoe.workflow.lock import RunLock
from maskmoe.workflow.paths import short_path
from maskmoe.workflow.process import StageProcess
from maskmoe.workflow.progress import ProgressLine, StageProgress, format_seconds
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.stage import Plan, Stage

_POLL_SECONDS = 0.2


class StageError(Exception):
    """A stage failed.

    Attributes:
        failure: the reason.
    """

    def __init__(self, stage: Stage, failure: Failure, log: Path) -> None:
        super().__init__(f"stage {stage.name} failed: {failure.message} (full output: {short_path(log)})")
        self.failure = failure


class Runner:
    """Runs the unfinished stages of a plan.

    Args:
        plan: the stages.
        record: record of the finished stages.
        line: shows the progress.
        lock: lock of the run folder.
    """

    def __init__(self, plan: Plan, record: RunRecord, line: ProgressLine, lock: RunLock) -> None:
        self._plan = plan
        self._record = record
        self._line = line
        self._lock = lock
        self._stages: list[Stage] = []

    def run(self) -> None:
        """Finish all stages.

        Raises:
            StageError: a stage failed.
            UserError: the next stage cannot use what an earlier stage has made.
        """
        for title, stage in self._unfinished():
            self._prepare(stage, title)
            self._run_stage(stage, title)

    def prepare(self, name: str) -> None:
        """Finish all stages before a stage, and prepare this stage to be started elsewhere.

        Args:
            name: name of the stage to be prepared.

        Raises:
            StageError: a stage failed.
            UserError: the next stage cannot use what an earlier stage has made.
        """
        for title, stage in self._unfinished():
            self._prepare(stage, title)
            if stage.name == name:
                return
            self._run_stage(stage, title)

    def _unfinished(self) -> Iterator[tuple[str, Stage]]:
        """Yield title and stage of each unfinished stage after the stages before are finished; print the finished."""
        self._plan.files.logs.mkdir(parents=True, exist_ok=True)
        for number, make_stage in enumerate(self._plan.stages, start=1):
            stage = make_stage()
            self._stages.append(stage)
            self._write_commands()
            title = f"[{number}/{len(self._plan.stages)}] {stage.name:<9}"
            if self._record.is_finished(stage):
                self._line.print(f"{title} finished earlier ({format_seconds(self._record[stage.name].seconds)})")
            else:
                yield title, stage

    def _write_commands(self) -> None:
        """Write the commands of all stages so far as a shell script."""
        parts = [f"#!/usr/bin/env bash\nset -euo pipefail\ncd {shlex.quote(str(Path.cwd()))}\n"]
        parts += [f"# {stage.name}\n{format_command(stage)}\n" for stage in self._stages]
        with atomic_output(self._plan.files.commands) as path:
            path.write_text("\n".join(parts), encoding="utf-8")

    def _prepare(self, stage: Stage, title: str) -> None:
        """Prepare the stage to start from nothing, or to resume from the files of an earlier start."""
        reason = self._record.reason_to_repeat(stage)
        if reason is not None:
            self._line.print(f"{title} is repeated: {reason}")
        if stage.is_resumable and self._record.is_started(stage) and reason is None:
            self._line.print(f"{title} resumes")
        else:
            self._set_aside(stage, title)
            self._record.begin(stage)
        for folder in stage.scratch:
            shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self, stage: Stage, title: str) -> None:
        """Move the files of an earlier start to the folder `previous`, so that no file is lost or mixed up."""
        files = self._plan.files
        made = (*stage.outputs, *stage.byproducts)
        candidates = (*made, files.log(stage.name))
        # A folder is moved with all that it contains.
        left = [path for path in candidates if path.exists() and not any(folder in path.parents for folder in made)]
        if any(path in made for path in left):
            self._line.print(f"{title} earlier output is kept in {short_path(files.previous)}")
        for path in left:
            files.previous.mkdir(exist_ok=True)
            kept = files.previous / path.name
            if kept.is_dir():
                shutil.rmtree(kept)
            os.replace(path, kept)

    def _run_stage(self, stage: Stage, title: str) -> None:
        """Run the stage's command to its end and record the outcome."""
        log = self._plan.files.log(stage.name)
        progress = StageProgress(title, self._plan.seq_length)
        process = StageProcess(stage.command, stage.environment, log, self._lock)
        lines: list[str] = []
        try:
            exit_code = self._follow(process, progress, lines)
        except BaseException:
            self._line.print(f"{title} is being stopped")
            process.stop()
            self._record.pause(stage, progress.seconds)
            raise
        if exit_code != 0:
            process.clear_up()
            self._record.pause(stage, progress.seconds)
            raise StageError(stage, explain_failure(exit_code, lines), log)
        self._record.finish(stage, progress.seconds)
        self._line.print(f"{title} done in {format_seconds(self._record[stage.name].seconds)}")

    def _follow(self, process: StageProcess, progress: StageProgress, lines: list[str]) -> int:
        """Show the progress and collect the printed lines until the process has ended; return its exit code."""
        while True:
            exit_code = process.exit_code
            for line in process.new_lines():
                lines.append(line)
                progress.read(line)
            self._line.update(str(progress))
            if exit_code is not None:
                return exit_code
            process.wait(_POLL_SECONDS)


def format_command(stage: Stage) -> str:
    """Return the stage's command for a shell, with one flag a line and paths relative to the current folder."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in stage.environment.items()]
    program, first, *others = (shlex.quote(short_path(word) if word[:1] == "/" else word) for word in stage.command)
    lines = [[*variables, program, first]]
    for word, quoted in zip(stage.command[2:], others, strict=True):
        if word.startswith("-"):
            lines.append([])
        lines[-1].append(quoted)
    return " \\\n    ".join(map(" ".join, lines))
