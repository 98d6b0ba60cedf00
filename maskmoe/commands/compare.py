"""Train all variants of a suite alike, with several seeds, and report how the variants differ.

Short runs choose the learning rates first. If the command is interrupted, start the same command again to resume. After
the suite file has changed, only the affected runs are repeated.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe import ranges
from maskmoe.command_line import Parser, split
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import open_data
from maskmoe.comparison.execution import compare, finish_run, report
from maskmoe.comparison.slurm import SlurmJobs, check_slurm
from maskmoe.comparison.slurm_options import SlurmOptions
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.launch.devices import find_devices
from maskmoe.launch.model_file import override
from maskmoe.paths import runs_folder

_DATA_OPTIONS = ("input", "packages", "data-path", "split", "tokenizer-type", "tokenizer-model", "vocab-size")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line up to `--`."""
    parser = Parser(
        usage="%(prog)s SUITE.yaml [options] [--slurm -- options of launch/slurm/submit.sh and sbatch]",
        description=__doc__,
        epilog="The run folder gets data/, checks/, tuning/ and runs/ with a folder for each run, and report/ with "
        "README.md, its plots, and results.json.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="a suite file, as in launch/suites/")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of all files [runs/SUITE]")
    parser.add_argument(
        "--jobs",
        type=ranges.PROCESSES,
        metavar="J",
        help="runs at a time [one for each core; with GPUs, one; in Slurm jobs, no limit]",
    )
    data = parser.add_argument_group("data, which replace the suite's data")
    data.add_argument("--input", nargs="+", metavar="FILE", help="text files: JSON lines or plain text")
    packages = "folder of the wheels that the suite's text is made of [runs/text]"
    data.add_argument("--packages", metavar="DIR", help=packages)
    data.add_argument("--data-path", nargs="+", metavar="P", help="an existing dataset, as Megatron's --data-path")
    data.add_argument("--split", type=split, metavar="A,B,C", help="Megatron's --split of --data-path")
    data.add_argument("--tokenizer-type", metavar="T", help="tokenizer of --data-path [SentencePieceTokenizer]")
    data.add_argument("--tokenizer-model", metavar="F", help="tokenizer file of --data-path")
    data.add_argument("--vocab-size", type=ranges.VOCAB_SIZE, metavar="V", help="number of ids of the tokenizer")
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


def open_comparison(options: argparse.Namespace) -> Comparison:
    """Return the comparison that the command line names.

    Raises:
        UserError: the suite or its data cannot be used.
    """
    suite = Suite.read(options.suite, os.environ)
    given = {name: vars(options)[name.replace("-", "_")] for name in _DATA_OPTIONS}
    own = {name: tuple(words) if isinstance(words, list) else (str(words),) for name, words in given.items() if words}
    folder = (options.run_dir or runs_folder() / suite.name).absolute()
    data = open_data(override(suite.data, own), folder / "data", suite.seq_length)
    return Comparison(suite, folder, data, find_devices())


def main() -> None:
    """Run the command."""
    # Argparse would take the words after `--` for positional arguments.
    end = [*sys.argv, "--"].index("--")
    arguments, slurm_words = sys.argv[1:end], sys.argv[end + 1 :]
    options = parse_arguments(arguments)
    if not options.slurm and (options.dry_run or slurm_words):
        raise UserError(f"{'--dry-run' if options.dry_run else 'options after `--`'}: only together with --slurm")
    comparison = open_comparison(options)
    if options.list:
        for run in comparison.known_runs():
            print(f"{'to do' if comparison.unfinished([run]) else 'finished':<10}{run.name}")
    elif options.report:
        print(report(comparison, arguments))
    elif options.run:
        finish_run(comparison, options.run)
    elif options.slurm:
        own = tuple(word for word in arguments if word not in ("--slurm", "--dry-run"))
        inputs = (options.suite.absolute().parent, *comparison.data.folders)
        jobs = SlurmJobs(comparison, SlurmOptions.parse(slurm_words), inputs, own, options.jobs, Path.cwd())
        if options.dry_run:
            jobs.show()
        else:
            check_slurm()
            compare(comparison, own, None, jobs)
    else:
        compare(comparison, arguments, options.jobs)
