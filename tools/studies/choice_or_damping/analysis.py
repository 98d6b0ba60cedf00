"""Prints what the plan of the study "choice or damping" asks for, from the table of results alone.

`python tools/studies/choice_or_damping/analysis.py docs/study/results.jsonl` prints block A's mean outcomes and rates,
and the differences of the other blocks whose runs are in the table, as Markdown. `check_numbers.py` computes the same
numbers without the package.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from maskmoe.comparison.statistics import mean, paired_difference
from maskmoe.comparison.table import RunResult, read_table

TEXTS = ("prose", "code")

CONTRASTS = {
    "confirm": (("maskmoe", "smoe"), ("maskmoe", "hash")),
    "mechanism": (
        ("gated-hash", "hash"),
        ("gated-hash", "maskmoe"),
        ("maskmoe-weight-1", "hash"),
        ("maskmoe-weight-1", "maskmoe"),
        ("maskmoe-smeared", "smoe-smeared"),
        ("maskmoe-smeared", "hash-smeared"),
    ),
    "long": (("maskmoe", "smoe"), ("maskmoe", "hash")),
    "experts": (("maskmoe", "smoe"), ("maskmoe", "hash")),
}
"""Differences of each block by the name of its suite. Block C is compared with runs of block B."""

Outcomes = Mapping[str, Mapping[int, float]]
"""The outcome of each run by arm and seed."""


def outcome(result: RunResult) -> float:
    """Return the mean loss over all tokens of the held-out prose and code together, in nats."""
    tokens = {each.text: each.tokens for each in result.losses if each.band == "all"}
    return sum(result.loss(text) * tokens[text] for text in TEXTS) / sum(tokens[text] for text in TEXTS)


def outcomes_by_suite(results: Sequence[RunResult]) -> dict[str, Outcomes]:
    """Return the outcomes of each suite."""
    suites: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        suites[result.suite][result.variant][result.seed] = outcome(result)
    return dict(suites)


def rates(outcomes: Outcomes) -> Iterator[str]:
    """Yield the mean outcome of each arm and rate of block A, and the rate that each arm gets."""
    means = {tuple(variant.split(".lr-")): mean(list(of.values())) for variant, of in outcomes.items()}
    yield "| arm | rate | runs | outcome |"
    yield "|---|---|---:|---:|"
    for (arm, rate), estimate in means.items():
        yield f"| {arm} | {rate} | {estimate.n} | {estimate:.4f} |"
    yield ""
    for arm in dict.fromkeys(arm for arm, _ in means):
        grid = sorted((rate for own, rate in means if own == arm), key=float)
        best = min(grid, key=lambda rate, arm=arm: means[arm, rate].mean)
        at_end = " (an end of the grid: add the next rate)" if best in (grid[0], grid[-1]) else ""
        yield f"- {arm}: {best}{at_end}"


def differences(suite: str, outcomes: Outcomes, confirmation: Outcomes) -> Iterator[str]:
    """Yield the differences of a block, over pairs of equal seeds.

    Args:
        suite: name of the block's suite.
        outcomes: outcomes of the block.
        confirmation: outcomes of block B, for arms that the block does not have itself.
    """
    yield "| difference | pairs | nats | 95 % interval | p (sign flips) |"
    yield "|---|---:|---:|---:|---:|"
    for own, baseline in CONTRASTS[suite]:
        own_outcomes, baseline_outcomes = (outcomes.get(arm) or confirmation.get(arm, {}) for arm in (own, baseline))
        difference = paired_difference(own_outcomes, baseline_outcomes)
        if not difference.n:
            continue
        yield (
            f"| {own} − {baseline} | {difference.n} | {difference.mean:+.4f} | "
            f"{difference.low:+.4f} to {difference.high:+.4f} | {difference.p:.4f} |"
        )


def main() -> None:
    """Print the blocks that have runs in the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="table of results, such as docs/study/results.jsonl")
    suites = outcomes_by_suite(read_table(parser.parse_args().table))
    if "rates" in suites:
        print("## rates", "", *rates(suites["rates"]), "", sep="\n")
    for suite in (suite for suite in CONTRASTS if suite in suites):
        print(f"## {suite}", "", *differences(suite, suites[suite], suites.get("confirm", {})), "", sep="\n")


if __name__ == "__main__":
    main()
