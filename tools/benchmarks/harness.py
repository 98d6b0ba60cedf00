"""Interleaved ratio benchmarks: ours and a baseline are measured in turn, under the same load of the machine.

A benchmark passes `Case`s to `run`, or measures by other means and builds `Result`s; it passes the results to `report`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskmoe.files.outputs import write_text


@dataclass(frozen=True)
class Case:
    """Two pieces of work to compare.

    Attributes:
        name: the name of the case.
        unit: the unit of the measured numbers.
        ours: does the work once and returns a number in `unit`.
        baseline: does the same for the baseline.
        costs: further facts about both sides, for the file of results.
    """

    name: str
    unit: str
    ours: Callable[[], float]
    baseline: Callable[[], float]
    costs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Paired measurements of a case in the order in which they were taken, and its costs; fields as in `Case`."""

    case: str
    unit: str
    ours: Sequence[float]
    baseline: Sequence[float]
    costs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Return the median of ours / baseline over the pairs."""
        return statistics.median(ours / baseline for ours, baseline in zip(self.ours, self.baseline, strict=True))

    def __str__(self) -> str:
        ours, baseline = statistics.median(self.ours), statistics.median(self.baseline)
        return f"{self.case} ratio={self.ratio:.3f} (ours {ours:.4g} {self.unit} baseline {baseline:.4g} {self.unit})"


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that measures the seconds that `work` takes."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def rate(work: Callable[[], object], amount: float) -> Callable[[], float]:
    """Return a function that measures the amount per second of `work`, which handles `amount` units."""
    measure_seconds = seconds(work)
    return lambda: amount / measure_seconds()


def run(cases: Iterable[Case], repeats: int) -> Iterator[Result]:
    """Measure a case `repeats` times after one uncounted round, and yield the result; then build the next case.

    The order within a pair alternates, so that neither side always runs with the caches and clocks that the other side
    leaves behind.
    """
    for case in cases:
        case.ours(), case.baseline()
        ours, baseline = [], []
        sides = [(case.ours, ours), (case.baseline, baseline)]
        for _ in range(repeats):
            for measure, values in sides:
                values.append(measure())
            sides.reverse()
        yield Result(case.name, case.unit, ours, baseline, case.costs)


def add_arguments(parser: argparse.ArgumentParser, repeats: int = 7) -> None:
    """Add the options that all benchmarks share."""
    parser.add_argument(
        "--repeats", type=int, default=repeats, metavar="R", help="pairs to measure (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write the results to this file")


def report(results: Iterable[Result], json_path: Path | None) -> None:
    """Print one line for each case as soon as it is measured; if a path is given, also write all results as JSON.

    The file is complete after each case, so a benchmark that is killed leaves the cases that it has measured.
    """
    written = []
    for result in results:
        print(result, flush=True)
        written.append(asdict(result) | {"ratio": result.ratio})
        if json_path:
            write_text(json_path, json.dumps(written, indent=2) + "\n")
