"""Prints what the plan of the study "choice or damping" asks for, from the table of results alone.

`python tools/studies/choice_or_damping/analysis.py runs/study/results.jsonl` prints block A's mean outcomes and rates,
the suites that have other rates, and the differences of the other blocks, as Markdown. Block B is read only when all of
its runs are in the table: the plan allows one look.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from maskmoe.comparison.statistics import Estimate, mean, paired_difference
from maskmoe.comparison.suite import Suite, Variant
from maskmoe.comparison.table import ALL_TOKENS, HeldOutLoss, RunResult, read_table
from maskmoe.errors import UserError
from maskmoe.processes.run_tool import run_tool

TEXTS = ("prose", "code")

CONFIRMATION = "confirm"

_ENDS = (("maskmoe", "smoe"), ("maskmoe", "hash"), ("smoe", "hash"))
CONTRASTS = {
    CONFIRMATION: _ENDS,
    "mechanism": (
        ("gated-hash", "hash"),
        ("gated-hash", "maskmoe"),
        ("maskmoe-weight-1", "hash"),
        ("maskmoe-weight-1", "maskmoe"),
        ("maskmoe-smeared", "smoe-smeared"),
        ("maskmoe-smeared", "hash-smeared"),
        ("hash-random", "hash"),
    ),
    "long": _ENDS,
    "experts": _ENDS,
}
"""Differences of each block by the name of its suite. Block C is compared with runs of block B."""

_RATE_DIVISOR = {"long": 4}
_FOLDER = Path(__file__).parent


@cache
def variants_of(suite: str) -> Mapping[str, Variant]:
    """Return the planned variants of a block by name."""
    return Suite.read(_FOLDER / f"{suite}.yaml", {}).variants


def outcome(losses: Iterable[HeldOutLoss], texts: Sequence[str] = TEXTS, band: str = ALL_TOKENS) -> float:
    """Return the mean loss over all tokens of the texts together, or over those of one frequency band, in nats."""
    counted = [each for each in losses if each.text in texts and each.band == band]
    return sum(each.loss * each.tokens for each in counted) / sum(each.tokens for each in counted)


@dataclass(frozen=True)
class Study:
    """The results of all blocks.

    Attributes:
        results: Results by suite, variant and seed.
    """

    results: Mapping[str, Mapping[str, Mapping[int, RunResult]]]

    @classmethod
    def read(cls, table: Path) -> "Study":
        """Read a table of results.

        Raises:
            UserError: The table is damaged, or a run has another learning rate than its suite.
        """
        planned = {suite: variants_of(suite) for suite in ("rates", *CONTRASTS)}
        found: dict[str, dict[str, dict[int, RunResult]]] = defaultdict(lambda: defaultdict(dict))
        for result in read_table(table):
            variant = planned.get(result.suite, {}).get(result.variant)
            if variant and float(result.settings["lr"]) != float(variant.flags["lr"][0]):
                raise UserError(
                    f"{table}: {result.variant} of {result.suite} with seed {result.seed} has the rate "
                    f"{result.settings['lr']}, but the suite has {variant.flags['lr'][0]}: remove the line"
                )
            found[result.suite][result.variant][result.seed] = result
        return cls(found)

    def missing(self, suite: str) -> tuple[int, int]:
        """Return the number of planned runs of a block that have no result, and the number of its planned runs."""
        planned = [(arm, seed) for arm, variant in variants_of(suite).items() for seed in variant.seeds]
        found = self.results.get(suite, {})
        return sum(seed not in found.get(arm, {}) for arm, seed in planned), len(planned)

    def runs(self, suite: str, arm: str) -> Mapping[int, RunResult]:
        """Return the results of an arm by seed: of the suite, or of block B if the suite does not have the arm.

        Block B has no results before it is complete.
        """
        found = self.results.get(suite, {}).get(arm, {})
        if suite == CONFIRMATION:
            return {} if self.missing(suite)[0] else found
        return found or (self.runs(CONFIRMATION, arm) if suite == "mechanism" else {})

    def outcomes(
        self, suite: str, arm: str, texts: Sequence[str] = TEXTS, band: str = ALL_TOKENS
    ) -> Mapping[int, float]:
        """Return the outcomes of an arm by seed, see `runs` and `outcome`."""
        return {seed: outcome(run.losses, texts, band) for seed, run in self.runs(suite, arm).items()}

    def difference(
        self, suite: str, own: str, baseline: str, texts: Sequence[str] = TEXTS, band: str = ALL_TOKENS
    ) -> Estimate:
        """Estimate the difference of two arms of a block over pairs of equal seeds."""
        return paired_difference(*(self.outcomes(suite, arm, texts, band) for arm in (own, baseline)))

    def rates(self) -> Mapping[str, Mapping[str, Estimate]]:
        """Return the mean outcome of block A by arm and rate, with ascending rates."""
        means: dict[str, dict[str, Estimate]] = defaultdict(dict)
        for variant in sorted(self.results.get("rates", {}), key=lambda variant: float(variant.partition(".lr-")[2])):
            arm, _, rate = variant.partition(".lr-")
            means[arm][rate] = mean([*self.outcomes("rates", variant).values()])
        return means


def best_rate(means: Mapping[str, Estimate]) -> str:
    """Return the rate with the smallest mean outcome."""
    return min(means, key=lambda rate: means[rate].mean)


def stale_rates(chosen: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each variant of the later blocks whose rate is not the one that the plan gives it.

    Args:
        chosen: Rate of each arm of block A.
    """
    for suite in CONTRASTS:
        for name, variant in variants_of(suite).items():
            arm = "maskmoe" if name == "gated-hash" else name.partition("-")[0]
            if arm not in chosen:
                continue
            own, wanted = variant.flags["lr"][0], float(chosen[arm]) / _RATE_DIVISOR.get(suite, 1)
            if not math.isclose(float(own), wanted):
                yield f"- {name} of {suite}.yaml has the rate {own}: change it to {wanted:g}"


def print_rates(study: Study) -> Iterator[str]:
    """Yield the mean outcome of each arm and rate of block A, the rate that each arm gets, and what must follow."""
    means = study.rates()
    yield "| arm | rate | runs | outcome |"
    yield "|---|---|---:|---:|"
    for arm, of_rate in means.items():
        for rate, estimate in of_rate.items():
            yield f"| {arm} | {rate} | {estimate.n} | {estimate:.4f} |"
    yield ""
    missing, planned = study.missing("rates")
    if missing:
        yield f"{missing} of {planned} runs are missing; the choice is not final."
        yield ""
    chosen = {arm: best_rate(of_rate) for arm, of_rate in means.items()}
    for arm, best in chosen.items():
        grid = [*means[arm]]
        at_end = " (an end of the grid: add the next rate)" if best in (grid[0], grid[-1]) else ""
        yield f"- {arm}: {best}{at_end}"
    yield from stale_rates(chosen)


def print_differences(study: Study, suite: str) -> Iterator[str]:
    """Yield the differences of a block."""
    missing, planned = study.missing(suite)
    if missing:
        yield f"{missing} of {planned} runs are missing."
        yield ""
    yield "| difference | pairs | nats | 95 % interval | p (sign flips) |"
    yield "|---|---:|---:|---:|---:|"
    for own, baseline in CONTRASTS[suite]:
        difference = study.difference(suite, own, baseline)
        if difference.n:
            yield (
                f"| {own} − {baseline} | {difference.n} | {difference.mean:+.4f} | "
                f"{difference.low:+.4f} to {difference.high:+.4f} | {difference.p:.4f} |"
            )


def main() -> None:
    """Print the blocks that have runs in the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="table of results, such as runs/study/results.jsonl")
    study = Study.read(parser.parse_args().table)
    if "rates" in study.results:
        print("## rates", "", *print_rates(study), "", sep="\n")
    for suite in (suite for suite in CONTRASTS if suite in study.results):
        print(f"## {suite}", "", *print_differences(study, suite), "", sep="\n")


if __name__ == "__main__":
    run_tool(main)
