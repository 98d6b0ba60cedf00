"""Takes a plan's stages in order, each once, however often the work is interrupted."""

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.workflow.failure import Failure, explain_failure
from maskmoe.workflow.lock import RunLock
from maskmoe.workflow.process import LogTail, StageProcess
from maskmoe.workflow.progress import ProgressLine, StageProgress, format_seconds
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.stage import ROOT, Plan, Stage, short_path

_POLL_SECONDS = 0.2


class StageError(Exception):
    """A stage failed.

    Attributes:
        failure: why.
    """

    def __init__(self, stage: Stage, failure: Failure, log: Path):
        super().__init__(f"stage {stage.name} failed: {failure.message} (full output: {log})")
        self.failure = failure


class Runner:
    """Runs the stages of a plan that are not finished yet.

    Args:
        plan: the stages.
        record: of what was done before.
        line: shows how far it is.
        lock: of the run folder.
    """

    def __init__(self, plan: Plan, record: RunRecord, line: ProgressLine, lock: RunLock):
        self._plan = plan
        self._record = record
        self._line = line
        self._lock = lock
        self._stages: list[Stage] = []

    def run(self) -> None:
        """Bring all stages to their ends.

        Raises:
            StageError: one failed.
            UserError: what a stage made cannot be used by the next.
        """
        for title, stage in self._unfinished():
            self._prepare(stage, title)
            self._run_stage(stage, title)

    def prepare(self, name: str) -> None:
        """Bring all stages before one to their ends, and make that ready to be started elsewhere.

        Args:
            name: of the stage, which need not be finished.

        Raises:
            StageError: one failed.
            UserError: what a stage made cannot be used by the next.
        """
        for title, stage in self._unfinished():
            self._prepare(stage, title)
            if stage.name == name:
                return
            self._run_stage(stage, title)

    def _unfinished(self) -> Iterator[tuple[str, Stage]]:
        """Each stage with its title, when those before it are finished; tells of finished ones."""
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
        """Write the commands of the stages so far, as a script that can be run or copied from."""
        parts = [f"#!/usr/bin/env bash\nset -euo pipefail\ncd {shlex.quote(str(ROOT))}\n"]
        for stage in self._stages:
            parts.append(f"# {stage.name}\n{format_command(stage)}\n")
        with atomic_output(self._plan.files.commands) as path:
            path.write_text("\n".join(parts), encoding="utf-8")

    def _prepare(self, stage: Stage, title: str) -> None:
        """Make the stage ready to start from nothing, or to go on where an earlier start has ended."""
        reason = self._record.reason_to_redo(stage)
        goes_on = stage.continues and self._record.is_started(stage) and reason is None
        if reason is not None:
            self._line.print(f"{title} is done again, for {reason}")
        if goes_on:
            self._line.print(f"{title} goes on where it was")
        else:
            self._set_aside(stage, title)
            self._record.begin(stage)
        for folder in stage.scratch:
            shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self, stage: Stage, title: str) -> None:
        """Move what an earlier start has left out of the way, so that nothing is lost and nothing is mixed up."""
        files = self._plan.files
        made = (*stage.outputs, *stage.byproducts, files.log(stage.name))
        left = [path for path in made if path.exists() and not any(folder in path.parents for folder in made)]
        if not left:
            return
        if any(path.exists() for path in stage.outputs):
            self._line.print(f"{title} earlier output is kept in {short_path(files.previous)}")
        files.previous.mkdir(exist_ok=True)
        for path in left:
            kept = files.previous / path.name
            if kept.is_dir():
                shutil.rmtree(kept)
            os.replace(path, kept)

    def _run_stage(self, stage: Stage, title: str) -> None:
        log = self._plan.files.log(stage.name)
        progress = StageProgress(title, self._plan.seq_length)
        process = StageProcess(stage.command, stage.environment, log, self._lock, ROOT)
        lines: list[str] = []
        try:
            self._follow(process, progress, lines)
        except BaseException:
            self._line.print(f"{title} is being stopped")
            process.stop()
            self._record.pause(stage, progress.seconds)
            raise
        if process.exit_code != 0:
            process.clear_up()
            self._record.pause(stage, progress.seconds)
            raise StageError(stage, explain_failure(process.exit_code, lines), log)
        self._record.finish(stage, progress.seconds)
        self._line.print(f"{title} done in {format_seconds(self._record[stage.name].seconds)}")

    def _follow(self, process: StageProcess, progress: StageProgress, lines: list[str]) -> None:
        """Show progress until the process has ended; collects what it prints."""
        is_running = True
        while is_running:
            is_running = process.exit_code is None
            for line in process.new_lines():
                lines.append(line)
                progress.read(line)
            self._line.update(str(progress))
            if is_running:
                process.wait(_POLL_SECONDS)


def format_command(stage: Stage) -> str:
    """The stage's command for a shell, one flag a line."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in stage.environment.items()]
    program, first, *others = map(shlex.quote, stage.command)
    lines = [[*variables, program, first]]
    for word, quoted in zip(stage.command[2:], others, strict=True):
        if word.startswith("-"):
            lines.append([])
        lines[-1].append(quoted)
    return " \\\n    ".join(map(" ".join, lines))


def read_log(path: Path) -> list[str]:
    """All lines of a log; none if there is no log."""
    return list(LogTail(path).new_lines()) if path.exists() else []
