"""Entry point of `launch/compare.sh`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe.cli import run_tool
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import open_data
from maskmoe.comparison.fairness import check_active_parameters
from maskmoe.comparison.pool import Pool, run_command
from maskmoe.comparison.report import write_report
from maskmoe.comparison.results import collect_results
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.launch.model_file import override
from maskmoe.stages.devices import find_devices
from maskmoe.stages.entry import run_stages, run_to_end, working_in
from maskmoe.stages.lock import locked
from maskmoe.stages.progress import ProgressLine
from maskmoe.stages.stage import ROOT, short_path


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="launch/compare.sh",
        allow_abbrev=False,
        description="Train all variants of a suite alike, with several seeds, and report how they differ. Learning "
        "rates are chosen first, by short runs. Started again after an interruption it continues where it was; a "
        "suite that has changed does again what the change concerns.",
        epilog="The run folder gets data/, checks/, tuning/ and runs/ with a folder for each run, and report/ with "
        "README.md, its plots, and results.json.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="one of launch/suites/, or your own")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="all files [runs/SUITE]")
    parser.add_argument("--jobs", type=int, metavar="J", help="runs at a time [one a core; with GPUs, one]")
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
    return parser.parse_args(arguments)


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
    arguments = sys.argv[1:]
    options = parse_arguments(arguments)
    comparison = open_comparison(options)
    if options.list:
        show_runs(comparison)
    elif options.report:
        print(report(comparison, arguments))
    elif options.run:
        plan = comparison.plan(comparison.find_run(options.run))
        plan.prepare()
        run_to_end(plan, lambda plan, record: "finished")
    else:
        if options.jobs is not None and options.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {options.jobs}")
        compare(comparison, arguments, options.jobs or default_jobs(comparison))


def default_jobs(comparison: Comparison) -> int:
    """Runs at a time: GPUs are for one run, cores for one each."""
    return 1 if comparison.devices.num_gpus else comparison.devices.num_cores


def compare(comparison: Comparison, arguments: Sequence[str], jobs: int) -> None:
    """Bring all runs to their ends, and write the report.

    Raises:
        RunFailure: runs failed.
        UserError: the input cannot be used, or the variants are too different.
    """
    line = ProgressLine(sys.stdout, interval=60.0)
    with working_in(comparison.folder, line):
        run_stages(comparison.data_plan, line)
        with locked(comparison.folder / ".lock") as lock:
            pool = Pool(comparison, run_command(arguments), jobs, line, lock)
            while runs := comparison.runs_of_next_phase():
                line.print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}")
                pool.work_off(runs)
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
