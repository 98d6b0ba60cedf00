"""Execute a comparison: finish its runs here or in Slurm jobs, and write its report."""

import shlex
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.fairness import check_active_parameters
from maskmoe.comparison.report import write_report
from maskmoe.comparison.rerun import rerun_table
from maskmoe.comparison.results import collect_results
from maskmoe.comparison.runs import Run
from maskmoe.comparison.slurm import SlurmJobs, next_runs, record_training, refuse_while_jobs_are_queued
from maskmoe.errors import RunFailure
from maskmoe.paths import short_path
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
    active, ended = list[_ActiveRun](), list[_ActiveRun]()
    start = time.monotonic()
    try:
        queue.update((), line)
        while queue.waiting or active:
            # Start as many runs as may run at a time.
            while queue.waiting and len(active) < jobs:
                next_run = queue.waiting.popleft()
                log = comparison.folder / next_run.name / "progress.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                process = StageProcess((*command, next_run.name), {}, log, lock)
                active.append(_ActiveRun(next_run, process, time.monotonic()))
            time.sleep(_POLL_SECONDS)
            # Report the runs that have ended, and add the runs that have waited for these runs to the queue.
            for run in [run for run in active if run.has_ended()]:
                active.remove(run)
                ended.append(run)
                total = len(ended) + len(active) + len(queue.waiting)
                verdict = "FAILED" if run.process.exit_code else "done"
                seconds = format_seconds(time.monotonic() - run.start)
                line.print(f"[{len(ended)}/{total}] {run.name} {verdict} in {seconds}")
                queue.update({run.name for run in (*active, *ended)}, line)
            # Show the state of the active runs.
            left = len(active) + len(queue.waiting)
            pace = (time.monotonic() - start) / max(1, len(ended))
            eta = f" · ETA {format_seconds(pace * left)}" if ended else ""
            states = " · ".join(f"{run.name}: {run.last_line}" for run in active)
            line.update(f"{len(ended)}/{len(ended) + left} runs{eta} · {states}")
    except BaseException:
        line.print("stopping")
        for run in active:
            run.process.stop()
        raise
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
    parts = {name: found.part for name, found in comparison.finished_parts().items()}
    path = write_report(collect_results(comparison.suite, parts, command), folder or comparison.folder / "report")
    return f"report: {short_path(path)}"
