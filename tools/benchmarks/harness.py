"""Interleaved ratio benchmarks: ours and a baseline are measured in turn, under the same load of the machine.

A benchmark passes `Case`s to `run`, or measures by other means and builds `Result`s; it passes the results to `report`.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskmoe.arguments import ranges
from maskmoe.arguments.parser import OneLineParser
from maskmoe.files.output_checks import check_outputs
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
    """Measurements of a case in the order in which they were taken, in pairs if there is a baseline, and its costs.

    The fields are those of `Case`. A case without a baseline has an empty `baseline`.
    """

    case: str
    unit: str
    ours: Sequence[float]
    baseline: Sequence[float]
    costs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Return the median of ours / baseline over the pairs; None without a baseline."""
        if not self.baseline:
            return None
        return statistics.median(ours / baseline for ours, baseline in zip(self.ours, self.baseline, strict=True))

    def __str__(self) -> str:
        ours = statistics.median(self.ours)
        if not self.baseline:
            return f"{self.case} {ours:.4g} {self.unit}"
        baseline = statistics.median(self.baseline)
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


def run(cases: Iterable[Case], repeats: int, warms_up: bool = True) -> Iterator[Result]:
    """Measure a case `repeats` times and yield the result; then build the next case.

    The order within a pair alternates, so that neither side always runs with the caches and clocks that the other side
    leaves behind.

    Args:
        cases: the cases.
        repeats: the number of pairs.
        warms_up: begin with a round that does not count. A side that starts a process each time needs none.
    """
    for case in cases:
        if warms_up:
            case.ours(), case.baseline()
        ours, baseline = [], []
        sides = [(case.ours, ours), (case.baseline, baseline)]
        for _ in range(repeats):
            for measure, values in sides:
                values.append(measure())
            sides.reverse()
        yield Result(case.name, case.unit, ours, baseline, case.costs)


def make_parser(documentation: str | None, repeats: int = 7) -> OneLineParser:
    """Return a parser with a benchmark's docstring as its help, and with the options that all benchmarks share."""
    parser = OneLineParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=ranges.COUNT, default=repeats, metavar="R", help="pairs to measure (default: %(default)s)"
    )
    parser.add_argument("--json", type=_writable, metavar="F", help="also write the results to this file")
    return parser


def _writable(text: str) -> Path:
    """Return a path of the command line. Raises UserError, before anything is measured, if it cannot be written."""
    check_outputs([text], force=True)
    return Path(text)


def sizes(form: str) -> Callable[[str], str]:
    """Return the `type` of an argument of a form such as K/N, in which capital letters stand for whole numbers."""

    def check(text: str) -> str:
        if not re.fullmatch(re.sub("[A-Z]", "[1-9][0-9]*", form), text):
            raise argparse.ArgumentTypeError(f"must be {form} with whole numbers, not {text!r}")
        return text

    return check


def processor() -> str:
    """Return the model of this machine's processor, whether it has AVX-512, and the cores that this process may use."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    wide = " with AVX-512" if re.search(r"^flags.*\bavx512f\b", text, re.MULTILINE) else ""
    return f"{model[1] if model else platform.machine()}{wide}, {len(os.sched_getaffinity(0))} cores"


def report(results: Iterable[Result], json_path: Path | None) -> None:
    """Print the processor, and one line for each case as soon as it is measured; write the same to the path, if any.

    The file is complete after each case, so a benchmark that is killed leaves the cases that it has measured.
    """
    print(f"processor: {processor()}", flush=True)
    written = []
    for result in results:
        print(result, flush=True)
        written.append(asdict(result) | {"ratio": result.ratio})
        if json_path:
            write_text(json_path, json.dumps({"processor": processor(), "results": written}, indent=2) + "\n")
