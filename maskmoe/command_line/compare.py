"""Train all variants of a suite alike, with several seeds, and report how the variants differ.

Trials choose the learning rates first. If the command is interrupted, start the same command again to resume. After
the suite file has changed, only the affected runs are repeated. Each finished run leaves a part, a small file. Parts of
other machines count as finished runs (--merge), so that a suite can be trained in pieces.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import Parser, split
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.cost import describe_cost
from maskmoe.comparison.data import open_data
from maskmoe.comparison.execution import compare, finish_run, report
from maskmoe.comparison.parts import read_parts
from maskmoe.comparison.runs import Run
from maskmoe.comparison.selection import Selection
from maskmoe.comparison.slurm import SlurmJobs, check_slurm
from maskmoe.comparison.slurm_options import SlurmOptions
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.files.paths import runs_folder
from maskmoe.launch.devices import find_devices
from maskmoe.launch.model_file import override
from maskmoe.training.preflight.assumed_gpu import add_assumed_gpu_arguments, assumed_gpu

_DATA_OPTIONS = ("input", "packages", "data-path", "split", "tokenizer-type", "tokenizer-model", "vocab-size")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line up to `--`."""
    parser = Parser(
        usage="%(prog)s SUITE.yaml [options] [--slurm -- options of launch/slurm/submit.sh and sbatch]",
        description=__doc__,
        epilog="The run folder gets data/, checks/, tuning/ and runs/ with a folder for each run, parts/ with a small "
        "file for each finished run, and report/ with README.md and its plots.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE.yaml", help="a suite file, as in launch/suites/")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of all files [runs/SUITE]")
    parser.add_argument(
        "--jobs",
        type=ranges.PROCESSES,
        metavar="J",
        help="runs at a time [one for each core; with GPUs, one; in Slurm jobs, no limit]",
    )
    pieces = parser.add_argument_group("pieces of a suite")
    pieces.add_argument(
        "--merge",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="DIR",
        help="folders with parts, for example parts/ of another machine's run folder: their runs are finished, and so "
        "are runs with the same settings and text as a run of another suite there",
    )
    pieces.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="finish only runs whose name, or whose variant's name, matches a shell pattern, and the runs that choose "
        "their learning rates",
    )
    pieces.add_argument("--seeds", nargs="+", default=[], type=ranges.SEED, metavar="N", help="finish only these seeds")
    pieces.add_argument(
        "--rerun",
        action="store_true",
        help="repeat finished runs in rerun/ of the run folder, with the same learning rates, and print how their "
        "losses differ; give --only and --seeds, too",
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
    action.add_argument("--list", action="store_true", help="only list the runs, which are finished, and the cost")
    action.add_argument("--report", action="store_true", help="only write the report of the finished runs")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the report of --report [report in the run folder]"
    )
    action.add_argument("--run", metavar="NAME", help="only finish one run, named as by --list")
    action.add_argument(
        "--slurm",
        action="store_true",
        help="train and evaluate in Slurm jobs, which get the options after `--` (--nodes=2 --gpus-per-node=8 …); one "
        "of the jobs continues the comparison, until the report is written",
    )
    add_assumed_gpu_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print sbatch's command lines of --slurm")
    return parser.parse_args(arguments)


def open_comparison(options: argparse.Namespace) -> Comparison:
    """Return the comparison that the command line names.

    Raises:
        UserError: the suite, its data or a merged part cannot be used, or no run is selected.
    """
    suite = Suite.read(options.suite, os.environ)
    given = {name: vars(options)[name.replace("-", "_")] for name in _DATA_OPTIONS}
    own = {name: tuple(words) if isinstance(words, list) else (str(words),) for name, words in given.items() if words}
    folder = (options.run_dir or runs_folder() / suite.name).absolute()
    flags = override(suite.data, own)
    data = open_data(flags, folder / "data", suite.seq_length)
    selection = Selection(options.only, options.seeds)
    selection.check(suite)
    selected = {run.variant.vocab_size for run in selection.whole_runs(suite)} - {""}
    if selected and "data-path" in flags:
        raise UserError(
            f"runs with a vocabulary of {min(selected, key=int)} need text, not a dataset: name text by --input, or "
            "choose other runs by --only"
        )
    vocabularies = {
        size: open_data(override(flags, {"vocab-size": (size,)}), folder / f"data-{size}", suite.seq_length)
        for size in {variant.vocab_size for variant in suite.variants.values()} - {""}
        if "data-path" not in flags
    }
    merged = read_parts(options.merge, suite.name)
    devices = find_devices()
    comparison = Comparison(suite, folder, data, devices, merged, selection=selection, vocabularies=vocabularies)
    comparison.check_merged_parts()
    return comparison.rerun() if options.rerun else comparison


def _state(comparison: Comparison, run: Run) -> str:
    if comparison.unfinished([run]):
        return "to do"
    return "merged" if comparison.is_merged(run) else "finished"


def main() -> None:
    """Run the command."""
    # Argparse would take the words after `--` for positional arguments.
    end = [*sys.argv, "--"].index("--")
    arguments, slurm_words = sys.argv[1:end], sys.argv[end + 1 :]
    options = parse_arguments(arguments)
    if not options.slurm and (options.dry_run or slurm_words):
        raise UserError(f"{'--dry-run' if options.dry_run else 'options after `--`'}: only together with --slurm")
    if options.output and not options.report:
        raise UserError("--output: only together with --report")
    if options.rerun and options.report:
        raise UserError("--rerun and --report exclude each other: leave out --report to repeat runs")
    comparison = open_comparison(options)
    if options.list:
        for run in comparison.known_runs():
            print(f"{_state(comparison, run):<10}{run.name}")
        for line in describe_cost(comparison.suite, assumed_gpu(options), options.vocab_size):
            print(line)
    elif options.report:
        print(report(comparison, arguments, options.output))
    elif options.run:
        finish_run(comparison, options.run)
    elif options.slurm:
        own = tuple(word for word in arguments if word not in ("--slurm", "--dry-run"))
        datasets = comparison.datasets_of_this_machine()
        merged = (*map(Path.absolute, options.merge), *([comparison.folder.parent] if options.rerun else []))
        inputs = (options.suite.absolute().parent, *merged, *(folder for data in datasets for folder in data.folders))
        jobs = SlurmJobs(comparison, SlurmOptions.parse(slurm_words), inputs, own, options.jobs, Path.cwd())
        if options.dry_run:
            jobs.show()
        else:
            check_slurm()
            compare(comparison, own, None, jobs)
    else:
        compare(comparison, arguments, options.jobs)
