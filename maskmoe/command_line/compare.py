"""Train all variants of a suite alike, with several seeds, and report how the variants differ.

If the command is interrupted, start the same command again to resume. The results are lines of one table; a run that
has a line there is not trained again. Tables of several machines can be joined to one file.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import Parser
from maskmoe.arguments.parser import add_option
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.report import write_report
from maskmoe.comparison.run import Run
from maskmoe.comparison.suite import Suite
from maskmoe.files.paths import RUNS, shipped_file, short_path
from maskmoe.launch.machine import find_devices


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        usage="%(prog)s SUITE.yaml [options]",
        description=__doc__,
        epilog="The run folder gets data/, runs/ with a folder for each run, results.jsonl with a line for each "
        "finished run, and report/ with README.md and losses.png.",
    )
    suite_help = "a suite file, or the name of a shipped one: small.yaml, per-layer.yaml, …; see launch/suites/"
    parser.add_argument("suite", type=partial(shipped_file, folder="suites"), metavar="SUITE.yaml", help=suite_help)
    add_option(parser, "--run-dir DIR", "folder of all files (default: runs/suites/SUITE)", Path)
    add_option(parser, "--table FILE", "table of the results (default: results.jsonl in the run folder)", Path)
    jobs = "runs at a time (default: one for each core; with GPUs, one)"
    add_option(parser, "--jobs J", jobs, ranges.PROCESSES)
    only = "finish only runs whose variant or name, such as maskmoe.seed-1, matches a shell pattern"
    add_option(parser, "--only PATTERN", only, nargs="+", default=())
    text = "text files instead of the suite's data: JSON lines or plain text"
    add_option(parser, "--input FILE", text, Path, nargs="+", default=())
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="only list the runs, and which are finished")
    prepare = "only make the data, the masks and the model files of the runs, and check all variants"
    action.add_argument("--prepare", action="store_true", help=prepare)
    action.add_argument("--report", action="store_true", help="only write the report of the finished runs")
    return parser.parse_args(arguments)


def open_comparison(options: argparse.Namespace) -> Comparison:
    """Return the comparison that the command line names.

    Raises:
        UserError: The suite or its data cannot be used.
    """
    suite, name = Suite.read(options.suite, os.environ), options.suite.stem
    folder = (options.run_dir or RUNS / "suites" / name).absolute()
    section = suite.data
    if options.input:
        text = tuple(str(path.absolute()) for path in options.input)
        section = section.model_copy(update={"input": text, "flags": {}})
    data = Dataset.of(section, folder / "data", suite.seq_length)
    table = (options.table or folder / "results.jsonl").absolute()
    return Comparison(suite, name, folder, table, data, find_devices())


def main() -> None:
    """Run the command."""
    options = parse_arguments(sys.argv[1:])
    comparison = open_comparison(options)
    runs = comparison.selected(options.only)
    comparison.collect()
    if options.list:
        finished = comparison.results()
        for run in runs:
            print(f"{'finished' if run.title in finished else 'to do':<10}{run.title}")
        return
    if not options.report:
        comparison.data.check()
        jobs = options.jobs or (1 if comparison.devices.num_gpus else comparison.devices.num_cores)
        _finish(comparison, runs, jobs, options.prepare)
        comparison.collect()
    if not options.prepare:
        results = [*comparison.results().values()]
        page = write_report(comparison.suite, comparison.name, results, comparison.folder / "report")
        print(f"report: {short_path(page)}")


def _finish(comparison: Comparison, runs: Sequence[Run], jobs: int, only_prepare: bool) -> None:
    """Finish the runs. The first signal ends the steps in progress in good order: training saves a checkpoint."""
    stopped_by: list[int] = []

    async def finish() -> None:
        task = asyncio.ensure_future(comparison.finish(runs, jobs, only_prepare))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop, task, number)
        await task

    def stop(task: asyncio.Task, number: int) -> None:
        if not stopped_by:
            stopped_by.append(number)
            task.cancel()

    try:
        asyncio.run(finish())
    except asyncio.CancelledError:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(128 + stopped_by[0]) from None
