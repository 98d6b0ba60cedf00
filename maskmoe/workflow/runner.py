"""Run the stages of a plan in order, each once, however often the work is interrupted."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, unwinding_on_signals
from maskmoe.files.paths import short_path
from maskmoe.processes.child_process import send_signal
from maskmoe.workflow.failure import explain_failure
from maskmoe.workflow.lock import RunLock, locked, other_holders
from maskmoe.workflow.process import StageProcess
from maskmoe.workflow.progress import ProgressLine, StageProgress, format_seconds
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.stage import Plan, Stage

_POLL_SECONDS = 0.2


def run_to_end(plan: Plan, report: Callable[[RunRecord], str]) -> None:
    """Run all unfinished stages as the main function of a command, then print the report.

    Args:
        plan: the stages.
        report: returns the report of a finished run.

    Raises:
        UserError: another command works in the run folder, or the input cannot be used.
        RunFailure: a stage failed for another reason.
        SystemExit: a signal arrived.
    """
    line = ProgressLine(sys.stdout)
    with working_in(plan.files.folder, line):
        record = run_stages(plan, line)
        line.print(f"\n{report(record)}")


@contextmanager
def working_in(folder: Path, line: ProgressLine) -> Iterator[None]:
    """Translate signals and errors of files in the block for the user of a command.

    Signals are handled as by `unwinding_on_signals`, so a run that was started with `nohup` survives its terminal.

    Args:
        folder: folder of the run.
        line: shows the progress.

    Raises:
        UserError: the folder cannot be used.
        SystemExit: a signal arrived.
    """
    with unwinding_on_signals():
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot work in --run-dir {folder}: {error}") from error
        except KeyboardInterrupt:
            line.print("interrupted; start the same command again to resume")
            raise
        finally:
            line.clear()


def run_stages(plan: Plan, line: ProgressLine, before: str | None = None) -> RunRecord:
    """Run the unfinished stages in the plan's folder, which is created if missing.

    Args:
        plan: the stages.
        line: shows the progress.
        before: name of a stage that is only prepared, to be started elsewhere; later stages are not run. None to run
            all stages.

    Raises:
        UserError: another command works in the folder, or a stage cannot use what the user or an earlier stage made.
        RunFailure: a stage failed for another reason.
    """
    plan.files.logs.mkdir(parents=True, exist_ok=True)
    with locked(plan.files.lock) as lock:
        record = RunRecord(plan.files.record)
        _Runner(plan, record, line, lock).run(before)
    return record


@dataclass(frozen=True)
class _Runner:
    """Runs the unfinished stages of a plan.

    Attributes:
        plan: the stages.
        record: record of the finished stages.
        line: shows the progress.
        lock: lock of the run folder.
    """

    plan: Plan
    record: RunRecord
    line: ProgressLine
    lock: RunLock

    def run(self, before: str | None) -> None:
        """Finish all stages, or all stages before one, see `run_stages`."""
        makers, stages = self.plan.stages, list[Stage]()
        for number, make_stage in enumerate(makers, start=1):
            stage = make_stage()
            stages.append(stage)
            self._write_commands(stages)
            title = f"[{number}/{len(makers)}] {stage.name:<9}"
            if self.record.is_finished(stage):
                self.line.print(f"{title} finished earlier ({format_seconds(self.record[stage.name].seconds)})")
                continue
            self._prepare(stage, title)
            if stage.name == before:
                return
            self._run_stage(stage, title)

    def _write_commands(self, stages: Sequence[Stage]) -> None:
        """Write the commands of all stages so far as a shell script."""
        parts = [f"#!/usr/bin/env bash\nset -euo pipefail\ncd {shlex.quote(str(Path.cwd()))}\n"]
        parts += [f"# {stage.name}\n{format_command(stage)}\n" for stage in stages]
        with atomic_output(self.plan.files.commands) as path:
            path.write_text("\n".join(parts), encoding="utf-8")

    def _prepare(self, stage: Stage, title: str) -> None:
        """Prepare the stage to start from nothing, or to resume from the files of an earlier start."""
        reason = self.record.reason_to_repeat(stage)
        if reason is not None:
            self.line.print(f"{title} is repeated: {reason}")
        if stage.is_resumable and stage.name in self.record and reason is None:
            self.line.print(f"{title} resumes")
        else:
            self._set_aside(stage, title)
            self.record.begin(stage)
        for folder in stage.scratch:
            shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self, stage: Stage, title: str) -> None:
        """Move the files of an earlier start to the folder `previous`, so that no file is lost or mixed up."""
        made = (*stage.outputs, *stage.byproducts)
        candidates = (*made, self.plan.files.log(stage.name))
        # A folder is moved with all that it contains.
        left = [path for path in candidates if path.exists() and not any(folder in path.parents for folder in made)]
        if any(path in made for path in left):
            self.line.print(f"{title} earlier output is kept in {short_path(self.plan.files.previous)}")
        for path in left:
            self.plan.files.previous.mkdir(exist_ok=True)
            kept = self.plan.files.previous / path.name
            if kept.is_dir():
                shutil.rmtree(kept)
            os.replace(path, kept)

    def _run_stage(self, stage: Stage, title: str) -> None:
        """Run the stage's command to its end and record the outcome.

        Raises:
            UserError: the stage failed because of its input.
            RunFailure: the stage failed for another reason.
        """
        log = self.plan.files.log(stage.name)
        progress = StageProgress(title, stage.seq_length)
        process = StageProcess(stage.command, stage.environment, log, self.lock)
        lines: list[str] = []
        try:
            if exit_code := self._follow(process, progress, lines):
                # A killed command leaves processes behind.
                send_signal(other_holders(self.lock), signal.SIGKILL)
                reason = explain_failure(exit_code, lines)
                raise type(reason)(f"stage {stage.name} failed: {reason} (full output: {short_path(log)})")
        except BaseException:
            if process.exit_code is None:
                self.line.print(f"{title} is being stopped")
            process.stop()
            self.record.pause(stage, progress.seconds)
            raise
        self.record.finish(stage, progress.seconds)
        self.line.print(f"{title} done in {format_seconds(self.record[stage.name].seconds)}")

    def _follow(self, process: StageProcess, progress: StageProgress, lines: list[str]) -> int:
        """Show the progress and collect the printed lines until the process has ended; return its exit code."""
        while True:
            exit_code = process.exit_code
            for line in process.new_lines():
                lines.append(line)
                progress.read(line)
            self.line.update(str(progress))
            if exit_code is not None:
                return exit_code
            process.wait(_POLL_SECONDS)


def format_command(stage: Stage) -> str:
    """Return the stage's command for a shell, with one flag a line and paths relative to the current folder."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in stage.environment.items()]
    lines = [variables]
    for position, word in enumerate(stage.command):
        # The program and its first argument share a line.
        if position > 1 and word.startswith("-"):
            lines.append([])
        lines[-1].append(shlex.quote(short_path(word) if word.startswith("/") else word))
    return " \\\n    ".join(map(" ".join, lines))
