"""Measure how long training stands still for a save, as a share of the time of 100 steps of the laptop model.

Each process trains `launch/models/laptop.yaml` with one thread on Zipf-distributed ids and saves a checkpoint every few
steps, asynchronously or synchronously; both kinds of processes alternate. The time of a save comes from the log of the
run, and the time of a step from the same process: the median of its logged intervals, which leave out the time in which
training stands still for a save. The first asynchronous save of a process has a case of its own. The last one is left
out: a run that ends waits for its files.

    python tools/benchmarks/save_stall.py
"""

import argparse
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import yaml
from laptop_step import ROOT, TIME, run_training, write_inputs

from maskmoe.errors import UserError
from maskmoe.processes.run_tool import run_tool

MODEL = ROOT / "launch" / "models" / "laptop.yaml"
STEPS = 100
VOCAB_SIZE = 4096
STALL = re.compile(r"saved; training stood still for (\S+) s")


@dataclass(frozen=True)
class Measurement:
    """The measurements of one process.

    Attributes:
        stalls: seconds for which training stood still, for each save in the order of the saves.
        steps: seconds of `STEPS` steps.
    """

    stalls: Sequence[float]
    steps: float


def measure(folder: Path, flags: dict[str, Any]) -> Measurement:
    """Train in a new process, and return the times in the log.

    Args:
        folder: gets the files of the run.
        flags: the flags of the run.

    Raises:
        RuntimeError: training failed.
    """
    output = run_training(ROOT, flags | {"save": folder / "checkpoints"})
    milliseconds = [float(value) for value in TIME.findall(output)]
    stalls = [float(value) for value in STALL.findall(output)]
    return Measurement(stalls, STEPS * statistics.median(milliseconds) / 1000)


def results_of(asynchronous: Sequence[Measurement], synchronous: Sequence[Measurement]) -> list[harness.Result]:
    """Return the cases: the median save of each process, and the first asynchronous save.

    Args:
        asynchronous: processes that saved asynchronously, at least three times.
        synchronous: processes that saved synchronously.
    """
    cases = {
        "asynchronous save": [(statistics.median(each.stalls[1:-1]), each) for each in asynchronous],
        "asynchronous save, first of a process": [(each.stalls[0], each) for each in asynchronous],
        "synchronous save": [(statistics.median(each.stalls), each) for each in synchronous],
    }
    return [
        harness.Result(
            f"{name} per {STEPS} steps",
            "s",
            [stall for stall, _ in pairs],
            [each.steps for _, each in pairs],
            {"stalls": [list(each.stalls) for _, each in pairs]},
        )
        for name, pairs in cases.items()
    ]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=5)
    parser.add_argument("--iterations", type=int, default=120, help="steps of a process (default: %(default)s)")
    parser.add_argument("--save-interval", type=int, default=20, help="steps between two saves (default: %(default)s)")
    return parser


def main() -> None:
    """Measure and report."""
    arguments = build_parser().parse_args()
    if arguments.iterations < 3 * arguments.save_interval:
        raise UserError("--iterations must be at least three times --save-interval")
    flags = yaml.safe_load(MODEL.read_text())
    flags |= {
        "train-iters": arguments.iterations,
        "save-interval": arguments.save_interval,
        "log-interval": 5,
        "eval-iters": 0,
    }
    measurements: dict[bool, list[Measurement]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        num_tokens = 2 * arguments.iterations * flags["global-batch-size"] * flags["seq-length"]
        flags |= write_inputs(Path(folder), flags, VOCAB_SIZE, num_tokens)
        for number in range(arguments.repeats):
            for is_asynchronous in (True, False) if number % 2 == 0 else (False, True):
                run_folder = Path(folder) / f"run{number}_{is_asynchronous}"
                kind = {"async-save": True} if is_asynchronous else {}
                measurements[is_asynchronous].append(measure(run_folder, flags | kind))
    harness.report(results_of(measurements[True], measurements[False]), arguments.json)


if __name__ == "__main__":
    run_tool(main)
