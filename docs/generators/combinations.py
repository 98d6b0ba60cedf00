"""Write docs/combinations.md: the settings that work with a routing mask, and the settings that are refused.

python docs/generators/combinations.py [--check]

The first table comes from tests/support/composition.py, whose rows name their tests. The second table comes from
`maskmoe.training.settings.refusals`. The text around the tables is in combinations.md.j2.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import pages

from maskmoe.megatron_compat import prepare_process

TESTS = Path(__file__).resolve().parents[2] / "tests"


class Refusal(Protocol):
    """A refusal as `maskmoe.training.settings.refusals` defines it."""

    flag: str
    reason: str


def render(works: Iterable[tuple[str, str]], refusals: Iterable[Refusal]) -> str:
    """Return the page.

    Args:
        works: pairs of a setting and the runs that show that it works.
        refusals: all refusals of the code.
    """
    works_table = pages.table(("setting", "shown by"), works)
    refused_table = pages.table(("setting", "reason"), [(pages.cell(r.flag), pages.cell(r.reason)) for r in refusals])
    return pages.fill("combinations.md.j2", works=works_table, refused=refused_table)


def tested_combinations() -> Iterator[tuple[str, str]]:
    """Yield each setting that works and the evidence for it, from the table of the composition test."""
    sys.path.insert(0, str(TESTS))  # for the tests' package `support`
    from support.composition import TABLE, Works

    for name, row in TABLE.items():
        if isinstance(row, Works):
            yield name, row.evidence


def render_from_code() -> str:
    """Return the page, made from the tests and the refusals."""
    from maskmoe.training.settings.refusals import REFUSALS

    return render(tested_combinations(), REFUSALS)


if __name__ == "__main__":
    prepare_process()
    pages.run("combinations.md", render_from_code, "Write docs/combinations.md from the tests and the refusals.")
