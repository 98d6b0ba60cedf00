"""Execute a comparison: finish its runs here or in Slurm jobs, and write its report."""

import shlex
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.fairness import check_active_parameters
from maskmoe.comparison.report import write_report
from maskmoe.comparison.rerun import rerun_table
from maskmoe.comparison.results import Results, collect_results
from maskmoe.comparison.runs import Run
from maskmoe.comparison.slurm import SlurmJobs, next_runs, record_training, refuse_while_jobs_are_queued
from maskmoe.errors import RunFailure
from maskmoe.files.paths import short_path
from maskmoe.workflow.lock import RunLock, locked
from maskmoe.workflow.process import StageProcess
from maskmoe.workflow.progress import ProgressLine, format_seconds
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import run_stages, run_to_end, working_in

_POLL_SECONDS = 0.5


def compare(comparison: Comparison, arguments: Sequence[str], jobs: int | None, slurm: SlurmJobs | None = None) -> None:
    """Finish all selected runs and write the report, or print the table of repeated runs.

    Args:
        comparison: the comparison.
        arguments: arguments of the command line, without the arguments for Slurm.
        jobs: number of runs at a time; None for one on GPUs, or one for each core without GPUs.
        slurm: the Slurm jobs that finish all runs except checks, which are always executed here, and that continue the
            comparison; None to execute all runs here.

    Raises:
        RunFailure: at least one run failed.
        UserError: the input cannot be used, the variants differ too much in size, Slurm refuses a job, or jobs of this
            comparison are still queued.
    """
    refuse_while_jobs_are_queued(comparison)
    line = ProgressLine(sys.stdout, interval=60.0)
    with working_in(comparison.folder, line):
        if not comparison.is_all_merged and _train(comparison, arguments, jobs, slurm, line):
            return
        line.print(rerun_table(comparison) if comparison.recorded else report(comparison, arguments))


def _train(
    comparison: Comparison, arguments: Sequence[str], jobs: int | None, slurm: SlurmJobs | None, line: ProgressLine
) -> bool:
    """Make the datasets and finish all selected runs, see `compare`; return whether Slurm jobs finish the runs."""
    devices = comparison.devices
    jobs = jobs or (1 if devices.num_gpus else devices.num_cores)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    # Other data must not replace the data of runs that another command trains.
    with locked(comparison.folder / ".lock") as lock:
        for data in comparison.datasets_of_this_machine():
            run_stages(data, line)
        comparison.check_text()
        while runs := next_runs(comparison):
            only_checks = runs[0].kind == "check"
            if slurm is not None and not only_checks:
                _print_runs(runs, line)
                slurm.submit(runs, line)
                return True
            _finish_runs(_RunQueue(comparison, only_checks), arguments, jobs, line, lock)
            check_active_parameters(comparison.parameters())
    return False


@dataclass
class _ActiveRun:
    """A process that finishes one run.

    Attributes:
        run: the run.
        process: the process.
        start: when the process was started.
        last_line: the newest line that the process has printed.
    """

    run: Run
    process: StageProcess
    start: float
    last_line: str = "starts"

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.name

    def has_ended(self) -> bool:
        """Return whether the process has ended, and read the lines that the process has printed."""
        has_ended = self.process.exit_code is not None
        for line in self.process.new_lines():
            self.last_line = line.strip() or self.last_line
        return has_ended


@dataclass
class _RunProcesses:
    """The processes of runs, of which at most `jobs` are active at a time.

    Attributes:
        folder: folder of the comparison.
        command: command line that finishes the run whose name follows.
        jobs: number of runs at a time.
        lock: the lock of the folder, which the processes inherit.
        active: runs whose process is active.
        ended: runs whose process has ended, in this order.
        start_time: when the first process could be started.
    """

    folder: Path
    command: tuple[str, ...]
    jobs: int
    lock: RunLock
    active: list[_ActiveRun] = field(default_factory=list)
    ended: list[_ActiveRun] = field(default_factory=list)
    start_time: float = field(default_factory=time.monotonic)

    @property
    def started(self) -> set[str]:
        """Names of all runs that were started."""
        return {run.name for run in (*self.active, *self.ended)}

    def start(self, waiting: deque[Run]) -> None:
        """Take as many runs out of the waiting ones as may run by now, and start their processes."""
        while waiting and len(self.active) < self.jobs:
            run = waiting.popleft()
            log = self.folder / run.name / "progress.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            process = StageProcess((*self.command, run.name), {}, log, self.lock)
            self.active.append(_ActiveRun(run, process, time.monotonic()))

    def take_ended(self) -> Iterator[_ActiveRun]:
        """Move the runs whose process has ended from `active` to `ended`, and yield each."""
        for run in [run for run in self.active if run.has_ended()]:
            self.active.remove(run)
            self.ended.append(run)
            yield run

    def describe(self, num_waiting: int) -> str:
        """Return a line with the number of ended runs, the estimated remaining time, and the state of active runs."""
        left = len(self.active) + num_waiting
        pace = (time.monotonic() - self.start_time) / max(1, len(self.ended))
        eta = f" · ETA {format_seconds(pace * left)}" if self.ended else ""
        states = " · ".join(f"{run.name}: {run.last_line}" for run in self.active)
        return f"{len(self.ended)}/{len(self.ended) + left} runs{eta} · {states}"

    def stop(self) -> None:
        """Stop the active processes."""
        for run in self.active:
            run.process.stop()


@dataclass
class _RunQueue:
    """The runs that can be started, in order.

    Attributes:
        comparison: the comparison.
        only_checks: whether the queue has only the checks.
        waiting: runs that can be started and are not started yet.
        known: names of all runs that were ever in the queue.
    """

    comparison: Comparison
    only_checks: bool
    waiting: deque[Run] = field(default_factory=deque)
    known: set[str] = field(default_factory=set)

    def update(self, started: Collection[str], line: ProgressLine) -> None:
        """Set `waiting` to the runs that can be started by now, and print the names of new runs.

        Tuning runs come before whole runs. Tuning runs stay in the queue even if results of other runs make them
        unnecessary, so that the tuning runs of a suite do not depend on the number of jobs.

        Args:
            started: names of the runs that were started before.
            line: shows the names.
        """
        tuning = {run.name: run for run in self.waiting if run.kind == "tuning"}
        found = {run.name: run for run in self.comparison.runs_to_start() if run.name not in started}
        runs = (tuning | found).values()
        self.waiting = deque(run for run in runs if not self.only_checks or run.kind == "check")
        if new := [run for run in self.waiting if run.name not in self.known]:
            _print_runs(new, line)
            self.known.update(run.name for run in new)


def _print_runs(runs: Sequence[Run], line: ProgressLine) -> None:
    line.print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}")


def _finish_runs(queue: _RunQueue, arguments: Sequence[str], jobs: int, line: ProgressLine, lock: RunLock) -> None:
    """Finish runs, at most `jobs` at a time, each in a process of its own. A failed run does not stop the other runs.

    Raises:
        RunFailure: at least one run failed, and the message names all runs that failed; or the settings or files of a
            finished run have changed.
    """
    comparison = queue.comparison
    command = (sys.executable, "-P", "-m", "maskmoe", "compare", *arguments, "--run")
    processes = _RunProcesses(comparison.folder, command, jobs, lock)
    try:
        queue.update((), line)
        while queue.waiting or processes.active:
            processes.start(queue.waiting)
            time.sleep(_POLL_SECONDS)
            # Report the runs that have ended, and add the runs that have waited for these runs to the queue.
            for run in processes.take_ended():
                num_ended = len(processes.ended)
                total = num_ended + len(processes.active) + len(queue.waiting)
                verdict = "FAILED" if run.process.exit_code else "done"
                seconds = format_seconds(time.monotonic() - run.start)
                line.print(f"[{num_ended}/{total}] {run.name} {verdict} in {seconds}")
                queue.update(processes.started, line)
            line.update(processes.describe(len(queue.waiting)))
    except BaseException:
        line.print("stopping")
        processes.stop()
        raise
    ended = processes.ended
    if failed := [f"{run.name}: {run.last_line}" for run in ended if run.process.exit_code]:
        raise RunFailure(f"{len(failed)} of {len(ended)} runs failed: {'; '.join(failed)}")
    if unfinished := comparison.unfinished(run.run for run in ended):
        raise RunFailure(
            f"{unfinished[0].name} was finished, but its settings or files have changed since; start the command again "
            "to repeat the run"
        )


def finish_run(comparison: Comparison, name: str) -> None:
    """Finish one run.

    Raises:
        UserError: no run has the name, another command works on the run, or checkpoints that were removed would have to
            be analyzed again.
        RunFailure: a stage failed.
    """
    run = comparison.find_run(name)
    if run.kind != "check" and (found := comparison.find_part(run)):
        print(f"{name} is finished: {short_path(found.file)}")
        return
    plan = comparison.plan(run)
    plan.prepare()
    record_training(plan)
    plan.check_analysis()
    if plan.unfinished:
        # The part of an earlier result must not stand for the new one.
        comparison.part_file(run).unlink(missing_ok=True)

    def write_part(_record: RunRecord) -> str:
        if run.kind != "check":
            comparison.write_part(run)
        return "finished"

    run_to_end(plan, write_part)


def report(comparison: Comparison, arguments: Sequence[str], folder: Path | None = None) -> str:
    """Write the report of all finished runs; return a line that names the report.

    Args:
        comparison: the comparison.
        arguments: arguments of the command line.
        folder: folder of the report; None for `report` in the folder of the comparison.

    Raises:
        UserError: the parts do not fit together.
    """
    command = shlex.join(["launch/compare.sh", *arguments])
    path = write_report(results_of(comparison, command), folder or comparison.folder / "report")
    return f"report: {short_path(path)}"


def results_of(comparison: Comparison, command: str) -> Results:
    """Collect the results of all finished runs.

    Args:
        comparison: the comparison.
        command: command that the report states.

    Raises:
        UserError: the parts do not fit together.
    """
    parts = {name: found.part for name, found in comparison.finished_parts().items()}
    return collect_results(comparison.suite, parts, command)
