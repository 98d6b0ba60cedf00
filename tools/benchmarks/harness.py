"""Interleaved ratio benchmarks: ours and a baseline are measured in turn, so that both see the same machine.

Each benchmark makes `Case`s and hands them to `run`, or measures by its own means and makes `Result`s. Both end in
`report`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """A pair to compare: each call of `ours` or `baseline` does the work once and returns a number in `unit`.

    `costs` is what else is known of the two, for the file of results.
    """

    name: str
    unit: str
    ours: Callable[[], float]
    baseline: Callable[[], float]
    costs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Paired measurements of a case, in the order they were taken, and its costs."""

    case: str
    unit: str
    ours: Sequence[float]
    baseline: Sequence[float]
    costs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of ours / baseline over the pairs."""
        return statistics.median(ours / baseline for ours, baseline in zip(self.ours, self.baseline, strict=True))

    def __str__(self) -> str:
        ours, baseline = statistics.median(self.ours), statistics.median(self.baseline)
        return f"{self.case} ratio={self.ratio:.3f} (ours {ours:.4g} {self.unit} baseline {baseline:.4g} {self.unit})"


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """Measure `work` by the time it takes."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def rate(work: Callable[[], object], amount: float) -> Callable[[], float]:
    """Measure `work`, which handles `amount` of something, by the amount per second."""
    measure_seconds = seconds(work)
    return lambda: amount / measure_seconds()


def run(cases: Iterable[Case], repeats: int) -> list[Result]:
    """Measure every case `repeats` times, after one round that does not count, before the next case is made.

    Within a pair the order alternates: neither side always runs on the caches and clocks that the other left.
    """
    results = []
    for case in cases:
        case.ours(), case.baseline()
        ours, baseline = [], []
        sides = [(case.ours, ours), (case.baseline, baseline)]
        for _ in range(repeats):
            for measure, values in sides:
                values.append(measure())
            sides.reverse()
        results.append(Result(case.name, case.unit, ours, baseline, case.costs))
    return results


def add_arguments(parser: argparse.ArgumentParser, repeats: int = 7) -> None:
    """Add the options that all benchmarks share."""
    parser.add_argument(
        "--repeats", type=int, default=repeats, metavar="R", help="pairs to measure (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write the results to this file")


def report(results: Sequence[Result], json_path: Path | None) -> None:
    """Print one line a case and, if a path is given, write the same with every measurement as JSON."""
    for result in results:
        print(result)
    if json_path:
        json_path.write_text(
            json.dumps([asdict(result) | {"ratio": result.ratio} for result in results], indent=2) + "\n"
        )
