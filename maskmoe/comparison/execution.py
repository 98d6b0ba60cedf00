"""Execute a comparison: finish its runs here or in Slurm jobs, and write its report."""

import shlex
import sys
from collections.abc import Callable, Sequence

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.fairness import check_active_parameters
from maskmoe.comparison.pool import Pool, run_command
from maskmoe.comparison.report import write_report
from maskmoe.comparison.results import collect_results
from maskmoe.comparison.runs import Run
from maskmoe.comparison.slurm import next_runs, record_training
from maskmoe.errors import RunFailure
from maskmoe.paths import short_path
from maskmoe.workflow.lock import locked
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.runner import run_stages, run_to_end, working_in

SubmitRuns = Callable[[Sequence[Run], ProgressLine], None]
"""Submits the runs of a phase to Slurm; one of the jobs continues the comparison."""


def compare(
    comparison: Comparison, arguments: Sequence[str], jobs: int | None, submit: SubmitRuns | None = None
) -> None:
    """Finish all runs and write the report.

    Args:
        comparison: the comparison.
        arguments: arguments of the command line, without the arguments for Slurm.
        jobs: number of runs at a time; None for one on GPUs, or one for each core without GPUs.
        submit: submits all runs except checks, which are always executed here; None to execute all runs here.

    Raises:
        RunFailure: at least one run failed.
        UserError: the input cannot be used, or the variants differ too much in size.
    """
    devices = comparison.devices
    jobs = jobs or (1 if devices.num_gpus else devices.num_cores)
    line = ProgressLine(sys.stdout, interval=60.0)
    with working_in(comparison.folder, line):
        run_stages(comparison.data, line)
        with locked(comparison.folder / ".lock") as lock:
            pool = Pool(comparison, run_command(arguments), jobs, line, lock)
            while runs := next_runs(comparison):
                line.print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}")
                if submit is not None and runs[0].kind != "check":
                    submit(runs, line)
                    return
                pool.finish(runs)
                if left := comparison.unfinished(runs):
                    raise RunFailure(f"{left[0].name} was finished, but its settings or files have changed since")
                check_active_parameters(comparison.parameters())
        line.print(report(comparison, arguments))


def finish_run(comparison: Comparison, name: str) -> None:
    """Finish one run.

    Raises:
        UserError: no run has the name, or another command works on the run.
        SystemExit: a stage failed.
    """
    plan = comparison.plan(comparison.find_run(name))
    plan.prepare()
    record_training(plan)
    run_to_end(plan, lambda record: "finished")


def show_runs(comparison: Comparison) -> None:
    """Print all known runs and whether each is finished."""
    for run in comparison.known_runs():
        print(f"{'finished' if comparison.is_finished(run) else 'to do':<10}{run.name}")


def report(comparison: Comparison, arguments: Sequence[str]) -> str:
    """Write the report of all finished runs; return a line that names the report."""
    command = shlex.join(["launch/compare.sh", *(word for word in arguments if word != "--report")])
    path = write_report(collect_results(comparison, command), comparison.report_folder)
    return f"report: {short_path(path)}"
