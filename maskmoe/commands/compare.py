"""Train all variants of a suite alike, with several seeds, and report how the variants differ."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import open_data
from maskmoe.comparison.execution import compare, finish_run, report, show_runs
from maskmoe.comparison.slurm import check_slurm, refuse_while_jobs_are_queued, show_phase, submit_phase
from maskmoe.comparison.slurm_jobs import Jobs, Phase, SlurmOptions
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.launch.devices import find_devices
from maskmoe.launch.model_file import override
from maskmoe.paths import runs_folder

_DATA_OPTIONS = ("input", "data-path", "split", "tokenizer-type", "tokenizer-model", "vocab-size")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line up to `--`."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s SUITE.yaml [options] [--slurm -- options of launch/slurm/submit.sh and sbatch]",
        allow_abbrev=False,
        description="Train all variants of a suite alike, with several seeds, and report how the variants differ. "
        "Short runs choose the learning rates first. If the command is interrupted, start the same command again to "
        "resume. After the suite file has changed, only the affected runs are repeated.",
        epilog="The run folder gets data/, checks/, tuning/ and runs/ with a folder for each run, and report/ with "
        "README.md, its plots, and results.json.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="a suite file, as in launch/suites/")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of all files [runs/SUITE]")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="J",
        help="runs at a time [one for each core; with GPUs, one; in Slurm jobs, no limit]",
    )
    data = parser.add_argument_group("data, which replace the suite's data")
    data.add_argument("--input", nargs="+", metavar="FILE", help="text files: JSON lines or plain text")
    data.add_argument("--data-path", nargs="+", metavar="P", help="an existing dataset, as Megatron's --data-path")
    data.add_argument("--split", metavar="A,B,C", help="Megatron's --split of --data-path")
    data.add_argument("--tokenizer-type", metavar="T", help="tokenizer of --data-path [SentencePieceTokenizer]")
    data.add_argument("--tokenizer-model", metavar="F", help="tokenizer file of --data-path")
    data.add_argument("--vocab-size", metavar="V", help="number of ids of the tokenizer")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="only list the runs, and which are finished")
    action.add_argument("--report", action="store_true", help="only write the report of the finished runs")
    action.add_argument("--run", metavar="NAME", help="only finish one run, named as by --list")
    action.add_argument(
        "--slurm",
        action="store_true",
        help="train and evaluate in Slurm jobs, which get the options after `--` (--nodes=2 --gpus-per-node=8 …); one "
        "of the jobs continues the comparison, until the report is written",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print sbatch's command lines of --slurm")
    return parser.parse_args(arguments)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before the first `--` and the arguments after it."""
    end = [*arguments, "--"].index("--")
    return [*arguments[:end]], [*arguments[end + 1 :]]


def open_comparison(options: argparse.Namespace) -> Comparison:
    """Return the comparison that the command line names.

    Raises:
        UserError: the suite or its data cannot be used.
    """
    suite = Suite.read(options.suite, os.environ)
    given = {name: getattr(options, name.replace("-", "_")) for name in _DATA_OPTIONS}
    own = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in given.items() if value}
    folder = (options.run_dir or runs_folder() / suite.name).absolute()
    data = open_data(override(suite.data, own), folder / "data", suite.seq_length)
    return Comparison(suite, folder, data, find_devices())


def main() -> None:
    """Run the command."""
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
        finish_run(comparison, options.run)
    elif options.slurm:
        compare_by_slurm(comparison, options, arguments, SlurmOptions.parse(slurm_words))
    else:
        refuse_while_jobs_are_queued(comparison)
        compare(comparison, arguments, options.jobs)


def compare_by_slurm(
    comparison: Comparison, options: argparse.Namespace, arguments: Sequence[str], slurm: SlurmOptions
) -> None:
    """Submit the jobs of the next phase, or only print the command lines that would submit the jobs.

    Args:
        comparison: the comparison.
        options: options of the command line.
        arguments: arguments from which the options were parsed.
        slurm: options after `--`.

    Raises:
        RunFailure: the last jobs have not finished any run.
        UserError: Slurm is missing or refuses a job, or jobs of this comparison are still queued.
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
    check_slurm()
    refuse_while_jobs_are_queued(comparison)
    compare(comparison, own, None, submit=lambda runs, line: submit_phase(comparison, runs, jobs, line))
