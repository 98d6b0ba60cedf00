"""Execute a comparison: finish its runs here or in Slurm jobs, and write its report."""

import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
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
        if not comparison.is_merged and _train(comparison, arguments, jobs, slurm, line):
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
            line.print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}")
            if slurm is not None and runs[0].kind != "check":
                slurm.submit(runs, line)
                return True
            _finish_runs(comparison, runs, arguments, jobs, line, lock)
            if left := comparison.unfinished(runs):
                raise RunFailure(f"{left[0].name} was finished, but its settings or files have changed since")
            check_active_parameters(comparison.parameters())
    return False


@dataclass
class _ActiveRun:
    """A process that finishes one run.

    Attributes:
        name: name of the run.
        process: the process.
        start: when the process was started.
        last_line: the newest line that the process has printed.
    """

    name: str
    process: StageProcess
    start: float
    last_line: str = "starts"

    def has_ended(self) -> bool:
        """Return whether the process has ended, and read the lines that the process has printed."""
        has_ended = self.process.exit_code is not None
        for line in self.process.new_lines():
            self.last_line = line.strip() or self.last_line
        return has_ended


def _finish_runs(
    comparison: Comparison, runs: Sequence[Run], arguments: Sequence[str], jobs: int, line: ProgressLine, lock: RunLock
) -> None:
    """Finish runs, at most `jobs` at a time, each in a process of its own. A failed run does not stop the other runs.

    Raises:
        RunFailure: at least one run failed. The message names all runs that failed.
    """
    command = (sys.executable, "-P", "-m", "maskmoe", "compare", *arguments, "--run")
    waiting, active, ended = deque(runs), list[_ActiveRun](), list[_ActiveRun]()
    start = time.monotonic()
    try:
        while waiting or active:
            # Start as many runs as may run at a time.
            while waiting and len(active) < jobs:
                name = waiting.popleft().name
                log = comparison.folder / name / "progress.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                active.append(_ActiveRun(name, StageProcess((*command, name), {}, log, lock), time.monotonic()))
            time.sleep(_POLL_SECONDS)
            # Report the runs that have ended.
            for run in [run for run in active if run.has_ended()]:
                active.remove(run)
                ended.append(run)
                verdict = "FAILED" if run.process.exit_code else "done"
                seconds = format_seconds(time.monotonic() - run.start)
                line.print(f"[{len(ended)}/{len(runs)}] {run.name} {verdict} in {seconds}")
            # Show the state of the others.
            pace = (time.monotonic() - start) / max(1, len(ended))
            eta = f" · ETA {format_seconds(pace * (len(runs) - len(ended)))}" if ended else ""
            states = " · ".join(f"{run.name}: {run.last_line}" for run in active)
            line.update(f"{len(ended)}/{len(runs)} runs{eta} · {states}")
    except BaseException:
        line.print("stopping")
        for run in active:
            run.process.stop()
        raise
    if failed := [f"{run.name}: {run.last_line}" for run in ended if run.process.exit_code]:
        raise RunFailure(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")


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
