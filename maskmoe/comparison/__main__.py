"""Entry point of `launch/compare.sh`."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from maskmoe.cli import run_tool
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import open_data
from maskmoe.comparison.fairness import check_active_parameters
from maskmoe.comparison.pool import Pool, run_command
from maskmoe.comparison.report import write_report
from maskmoe.comparison.results import collect_results
from maskmoe.comparison.runs import Run
from maskmoe.comparison.slurm import (
    check_sbatch,
    next_runs,
    note_training,
    refuse_while_jobs_work,
    show_phase,
    submit_phase,
)
from maskmoe.comparison.slurm_jobs import Jobs, Phase, SlurmOptions
from maskmoe.comparison.suite import Suite
from maskmoe.errors import RunFailure, UserError
from maskmoe.launch.devices import find_devices
from maskmoe.launch.model_file import override
from maskmoe.workflow.entry import run_stages, run_to_end, working_in
from maskmoe.workflow.lock import locked
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.stage import ROOT, short_path


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="launch/compare.sh",
        usage="launch/compare.sh SUITE.yaml [options] [--slurm -- options of launch/slurm/submit.sh and sbatch]",
        allow_abbrev=False,
        description="Train all variants of a suite alike, with several seeds, and report how they differ. Learning "
        "rates are chosen first, by short runs. Started again after an interruption it continues where it was; a "
        "suite that has changed does again what the change concerns.",
        epilog="The run folder gets data/, checks/, tuning/ and runs/ with a folder for each run, and report/ with "
        "README.md, its plots, and results.json.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="one of launch/suites/, or your own")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="all files [runs/SUITE]")
    parser.add_argument(
        "--jobs", type=int, metavar="J", help="runs at a time [one a core; with GPUs, one; in jobs, all]"
    )
    data = parser.add_argument_group("data, in place of the suite's")
    data.add_argument("--input", nargs="+", metavar="FILE", help="text files, JSON lines or plain")
    data.add_argument("--data-path", nargs="+", metavar="P", help="a dataset that is there, as Megatron takes it")
    data.add_argument("--split", metavar="A,B,C", help="of --data-path")
    data.add_argument("--tokenizer-type", metavar="T", help="of --data-path [SentencePieceTokenizer]")
    data.add_argument("--tokenizer-model", metavar="F", help="of --data-path")
    data.add_argument("--vocab-size", metavar="V", help="ids of the tokenizer")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="only show the runs, and which are finished")
    action.add_argument("--report", action="store_true", help="only write the report, of what is finished")
    action.add_argument("--run", metavar="NAME", help="only take up one run, as --list names it")
    action.add_argument(
        "--slurm",
        action="store_true",
        help="train and evaluate in Slurm jobs, which get the options after `--` (--nodes=2 --gpus-per-node=8 …); one "
        "of them goes on with the comparison, until the report is written",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print sbatch's command lines of --slurm")
    return parser.parse_args(arguments)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the command itself, and what follows `--`."""
    end = [*arguments, "--"].index("--")
    return [*arguments[:end]], [*arguments[end + 1 :]]


def open_comparison(options: argparse.Namespace) -> Comparison:
    """The comparison that the command line names.

    Raises:
        UserError: the suite or its data are unusable.
    """
    suite = Suite.read(options.suite, os.environ)
    names = ("input", "data-path", "split", "tokenizer-type", "tokenizer-model", "vocab-size")
    given = {name: getattr(options, name.replace("-", "_")) for name in names}
    own = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in given.items() if value}
    folder = (options.run_dir or ROOT / "runs" / suite.name).absolute()
    seq_length = int(suite.variants[0].flags["seq-length"][0])
    return Comparison(suite, folder, open_data(override(suite.data, own), folder / "data", seq_length), find_devices())


def main() -> None:
    arguments, slurm_words = split_arguments(sys.argv[1:])
    options = parse_arguments(arguments)
    if not options.slurm and (options.dry_run or slurm_words):
        raise UserError(f"{'--dry-run' if options.dry_run else 'options after `--`'}: only together with --slurm")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    comparison = open_comparison(options)
    if options.list:
        show_runs(comparison)
    elif options.report:
        print(report(comparison, arguments))
    elif options.run:
        take_up(comparison, options.run)
    elif options.slurm:
        compare_by_slurm(comparison, options, arguments, SlurmOptions.parse(slurm_words))
    else:
        refuse_while_jobs_work(comparison)
        compare(comparison, arguments, options.jobs or default_jobs(comparison))


def take_up(comparison: Comparison, name: str) -> None:
    """Bring one run to its end.

    Raises:
        UserError: there is none of that name, or another command is at work on it.
        SystemExit: a stage failed.
    """
    plan = comparison.plan(comparison.find_run(name))
    plan.prepare()
    note_training(plan)
    run_to_end(plan, lambda plan, record: "finished")


def compare_by_slurm(
    comparison: Comparison, options: argparse.Namespace, arguments: Sequence[str], slurm: SlurmOptions
) -> None:
    """Submit the jobs of the next phase, or print what would submit them.

    Args:
        comparison: to be brought to its end.
        options: of the command line.
        arguments: those that the options are from.
        slurm: what followed `--`.

    Raises:
        RunFailure: nothing was finished by the last jobs.
        UserError: Slurm is not here or refuses a job, or jobs of this comparison are still in its queue.
    """
    own = tuple(word for word in arguments if word not in ("--slurm", "--dry-run"))

    def jobs(phase: Phase) -> Jobs:
        return Jobs(
            phase=phase,
            folder=comparison.folder,
            suite=comparison.suite.name,
            options=slurm,
            inputs=(options.suite.absolute().parent, *comparison.data.folders),
            arguments=own,
            throttle=options.jobs,
            cwd=Path.cwd(),
        )

    if options.dry_run:
        show_phase(comparison, jobs)
        return
    check_sbatch()
    refuse_while_jobs_work(comparison)
    compare(
        comparison,
        own,
        default_jobs(comparison),
        submit=lambda runs, line: submit_phase(comparison, runs, jobs, line),
    )


def default_jobs(comparison: Comparison) -> int:
    """Runs at a time: GPUs are for one run, cores for one each."""
    return 1 if comparison.devices.num_gpus else comparison.devices.num_cores


def compare(
    comparison: Comparison,
    arguments: Sequence[str],
    jobs: int,
    submit: Callable[[Sequence[Run], ProgressLine], None] | None = None,
) -> None:
    """Bring all runs to their ends, and write the report.

    Args:
        comparison: that the runs belong to.
        arguments: of the command line, without what concerns Slurm.
        jobs: runs at a time.
        submit: leaves the runs of a phase to jobs, one of which will go on with the comparison; checks stay here.

    Raises:
        RunFailure: runs failed.
        UserError: the input cannot be used, or the variants are too different.
    """
    line = ProgressLine(sys.stdout, interval=60.0)
    with working_in(comparison.folder, line):
        run_stages(comparison.data_plan, line)
        with locked(comparison.folder / ".lock") as lock:
            pool = Pool(comparison, run_command(arguments), jobs, line, lock)
            while runs := next_runs(comparison):
                line.print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}")
                if submit is not None and runs[0].kind != "check":
                    submit(runs, line)
                    return
                pool.work_off(runs)
                if left := comparison.unfinished(runs):
                    raise RunFailure(f"{left[0].name} was brought to its end, but what it depends on has changed since")
                check_active_parameters(comparison.parameters())
        line.print(report(comparison, arguments))


def show_runs(comparison: Comparison) -> None:
    """Print all runs that are known."""
    for run in comparison.known_runs():
        print(f"{'finished' if comparison.is_finished(run) else 'to do':<10}{run.name}")


def report(comparison: Comparison, arguments: Sequence[str]) -> str:
    """Write the report of what is finished; returns where it is."""
    command = shlex.join(["launch/compare.sh", *(word for word in arguments if word != "--report")])
    return f"report: {short_path(write_report(collect_results(comparison, command), comparison.report_folder))}"


if __name__ == "__main__":
    run_tool(main)
