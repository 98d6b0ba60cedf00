"""Train all variants of a suite alike, with several seeds, and report how the variants differ.

If the command is interrupted, start the same command again to resume. The results are lines of one table; a run that
has a line there is not trained again. Tables of other machines can be merged.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from maskmoe.arguments import ranges
from maskmoe.arguments.parser import Parser, add_force_argument, add_option
from maskmoe.command_line import build_routing_mask, widen_routing_mask
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.report import REPORT_FILES
from maskmoe.comparison.run import Run
from maskmoe.comparison.slurm import check_queue, submission, submit
from maskmoe.comparison.stage import POLL_SECONDS, StageFolder, StatusLine, stopping_in_order
from maskmoe.comparison.suite import PATHS, DataSection, Suite, absolute, check_text_name
from maskmoe.comparison.table import read_table
from maskmoe.errors import UserError, refused_by_system
from maskmoe.files.outputs import check_outputs
from maskmoe.files.paths import RUNS, SUBMIT_SCRIPT, shipped_file, short_path
from maskmoe.launch.machine import find_devices
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.routing_mask.widening import widened_numbers


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line up to `--`."""
    parser = Parser(
        usage="%(prog)s SUITE.yaml [options] [--slurm -- options of launch/slurm/submit.sh and sbatch]",
        description=__doc__,
        epilog="The run folder gets data/, runs/ with a folder for each run, results.jsonl with a line for each "
        "finished run, and report/ with README.md and losses.png.",
    )
    suite_help = "a suite file, or the name of a shipped one: small.yaml, per-layer.yaml, …; see launch/suites/"
    parser.add_argument("suite", type=partial(shipped_file, folder="suites"), metavar="SUITE.yaml", help=suite_help)
    add_option(parser, "--run-dir DIR", "folder of all files (default: runs/suites/SUITE)", Path)
    add_option(parser, "--table FILE", "table of the results (default: results.jsonl in the run folder)", Path)
    jobs = "runs at a time (default: one for each core; with GPUs, one; in Slurm, no limit)"
    add_option(parser, "--jobs J", jobs, ranges.PROCESSES)
    pieces = parser.add_argument_group("pieces of a suite")
    merged = "tables of other machines, whose results are added to the table first"
    add_option(pieces, "--merge FILE", merged, Path, nargs="+")
    add_option(pieces, "--only PATTERN", "finish only runs whose variant or name matches a shell pattern", nargs="+")
    add_option(pieces, "--seeds N", "finish only these seeds", ranges.RUN_SEED, nargs="+")
    data = parser.add_argument_group("data, which replace the suite's data")
    add_option(data, "--input FILE", "text files: JSON lines or plain text", nargs="+")
    add_option(
        data, "--held-out NAME=FILE", "further text files to evaluate on, each with a name", _named_file, nargs="+"
    )
    add_option(data, "--data-path P", "an existing dataset, as Megatron's --data-path", nargs="+")
    add_option(data, "--split A,B,C", "Megatron's --split of --data-path", ranges.split)
    add_option(data, "--tokenizer-type T", "tokenizer of --data-path (default: SentencePieceTokenizer)")
    add_option(data, "--tokenizer-model F", "tokenizer file of --data-path")
    add_option(data, "--vocab-size V", "number of ids of the tokenizer", ranges.VOCAB_SIZE)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="only list the runs, and which are finished")
    action.add_argument("--report", action="store_true", help="only write the report of the finished runs")
    action.add_argument("--run", type=Path, metavar="DIR", help="only finish the run whose folder is named")
    jobs_help = "train and evaluate in one Slurm job array, which gets the options after `--` (--nodes=2 …)"
    action.add_argument("--slurm", action="store_true", help=jobs_help)
    parser.add_argument("--dry-run", action="store_true", help="only print the command that --slurm would run")
    report = "folder of the report (default: report/ in the run folder, where --force is not needed)"
    add_option(parser, "--output-dir DIR", report, Path)
    add_force_argument(parser)
    return parser.parse_args(arguments)


def _named_file(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, not {word!r}")
    try:
        return check_text_name(name), path
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE: {error}") from error


def _given_data(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of the suite's section `data` that the command line replaces, with absolute paths."""
    given = {key: value for key in DataSection.model_fields if (value := getattr(options, key, None))}
    for key, kind in {"input": tuple, "data_path": tuple, "held_out": dict, "vocab_size": str}.items():
        if key in given:
            given[key] = kind(given[key])
    if len(given.get("held_out", ())) < len(options.held_out or ()):
        raise UserError("--held-out has two texts of one name")
    return given | {key: absolute(given[key], Path.cwd()) for key in PATHS if key in given}


def open_comparison(options: argparse.Namespace) -> Comparison:
    """Return the comparison that the command line names.

    Raises:
        UserError: The suite or its data cannot be used.
    """
    suite, name = Suite.read(options.suite, os.environ), options.suite.stem
    given = _given_data(options)
    if "input" in given:
        if "data_path" in given:
            raise UserError("--input and --data-path exclude each other: the dataset exists, or is made from text")
        given["data_path"] = ()  # of the suite
    folder = (options.run_dir or RUNS / "suites" / name).absolute()
    data = Dataset.of(suite.data.model_copy(update=given), folder / "data", suite.seq_length)
    table = (options.table or folder / "results.jsonl").absolute()
    comparison = Comparison(suite, name, folder, table, data, find_devices())
    for run in comparison.runs:
        if run.variant.has_experts:
            check_mask(run)
    return comparison


def check_mask(run: Run) -> None:
    """Refuse flags of a mask and its widening before anything is made. Raises a UserError that names the variant."""
    words = run.mask_stage(run.routing_mask).command
    try:
        arguments = build_routing_mask.parse_arguments(words[words.index("mask") + 1 :])
        recipe = None if arguments.expert_table else build_routing_mask.recipe_from(arguments)
        if run.variant.widen:
            words = run.widening_stage(run.routing_mask).command
            wider = widen_routing_mask.parse_arguments(words[words.index("widen") + 1 :])
            if recipe:  # a new recipe checks its numbers
                mass, visible = widened_numbers(recipe, wider.frequent_mass, wider.frequent_visible_experts)
                replace(recipe, frequent_mass=mass, frequent_visible_experts=visible)
    except UserError as error:
        raise UserError(f"the mask of the variant {run.name}: {error}") from error


def main() -> None:
    """Run the command."""
    # Argparse would take the words after `--` for positional arguments.
    end = [*sys.argv, "--"].index("--")
    arguments, slurm_words = sys.argv[1:end], sys.argv[end + 1 :]
    options = parse_arguments(arguments)
    if not options.slurm and (options.dry_run or slurm_words):
        raise UserError(f"{'--dry-run' if options.dry_run else 'options after `--`'}: only together with --slurm")
    if options.slurm and not SUBMIT_SCRIPT.exists():
        raise UserError("--slurm needs a checkout of the repository: start launch/compare.sh there")
    comparison, line = open_comparison(options), StatusLine(sys.stdout)
    if not (options.list or options.run or options.dry_run):
        inputs = [options.suite, comparison.table, *comparison.data.text, *comparison.data.held_out.values()]
        report = [(options.output_dir or comparison.report_folder) / name for name in REPORT_FILES]
        folder = StageFolder(comparison.data.folder)
        if options.output_dir:
            with refused_by_system(f"cannot write to --output-dir {options.output_dir}"):
                options.output_dir.mkdir(parents=True, exist_ok=True)
            check_outputs(report, inputs, options.force)
            if not options.report:
                folder.check((), inputs)
        else:
            # --report may run without stages, but leaves both files.
            folder.check(report, inputs, is_own=all(path.exists() for path in report))
    runs = comparison.selected(options.only or (), options.seeds or ())
    if options.merge:
        # An absent table would count as an empty one.
        if missing := [table for table in options.merge if not table.exists()]:
            raise UserError(f"--merge {missing[0]} does not exist")
        comparison.add(result for table in options.merge for result in read_table(table))
    if not options.run:
        # Elements of a job array leave their results in the folders of their runs.
        comparison.collect()
    if options.list:
        finished = comparison.results()
        for run in runs:
            print(f"{'finished' if run.title in finished else 'to do':<10}{run.title}")
    elif options.run:
        _finish_one(comparison, options.run, line)
    else:
        if not options.report:
            comparison.data.check()  # before anything is written
            lock = nullcontext() if options.dry_run else locked_folder(comparison.folder, "--run-dir")
            with lock, stopping_in_order():
                unfinished = _finish(comparison, runs, options, slurm_words, line)
            if unfinished:
                return
        line.print(f"report: {short_path(comparison.report(options.output_dir))}")


def _finish(
    comparison: Comparison,
    runs: Sequence[Run],
    options: argparse.Namespace,
    slurm_words: Sequence[str],
    line: StatusLine,
) -> bool:
    """Finish the unfinished runs, here or in Slurm; return whether Slurm's jobs are still to finish them."""
    if not options.dry_run:
        if options.slurm:
            check_queue(comparison)
        comparison.make_data(line)
    waiting = comparison.unfinished(runs)
    if not options.slurm:
        comparison.check(waiting, line)
        default = 1 if comparison.devices.num_gpus else comparison.devices.num_cores
        comparison.finish_all(waiting, options.jobs or default, line)
        return False
    if not waiting:
        line.print("all runs are finished")
        return options.dry_run
    command = submission(comparison, waiting, _job_arguments(options, comparison), slurm_words, options.jobs)
    if options.dry_run:
        print(shlex.join(command))
        return True
    comparison.check(waiting, line)
    for run in waiting:
        run.prepare()
        folder = StageFolder(run.folder)
        folder.run(run.stages_before_training(), line)
        folder.begin(run.training_stage())
    line.print(submit(comparison, waiting, command).strip())
    return True


def _job_arguments(options: argparse.Namespace, comparison: Comparison) -> list[str]:
    """Return the arguments with which a job opens the comparison.

    All paths are absolute, because the job may run in another folder.
    """
    # Resolve linked folders: a container has a folder in the place of a link, so `..` would lead elsewhere.
    suite = options.suite.parent.resolve() / options.suite.name
    words = [str(suite), "--run-dir", str(comparison.folder)]
    for key, value in _given_data(options).items():
        values = [f"{name}={path}" for name, path in value.items()] if isinstance(value, dict) else value
        words += [f"--{key.replace('_', '-')}", *((values,) if isinstance(values, str) else values)]
    return words


def _finish_one(comparison: Comparison, folder: Path, line: StatusLine) -> None:
    """Finish the run with a folder, which may be named by a link."""
    run = next((run for run in comparison.runs if run.folder.resolve() == folder.resolve()), None)
    if run is None:
        raise UserError(f"--run: {folder} is not the folder of a run of the suite")
    with locked_folder(run.folder, "--run-dir"), stopping_in_order():
        for state in comparison.finish(run):
            line.update(state)
            time.sleep(POLL_SECONDS)
