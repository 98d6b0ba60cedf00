"""Write the page of supported combinations: the settings that work with a routing mask, and those that are refused.

python docs/generators/combinations.py OUTPUT

The first table comes from tests/support/composition.py, whose rows name their tests. The other tables come from
`maskmoe.training.settings.refused_settings`. The text around the tables is in combinations.md.j2.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pages

from maskmoe.megatron_compat import prepare_process

TESTS = Path(__file__).resolve().parents[2] / "tests"


class Check(Protocol):
    """A refused setting, as `maskmoe.training.settings.refused_settings` defines it."""

    name: str
    reason: str


def render(works: Iterable[tuple[str, str]], refused: Mapping[str, Iterable[Check]]) -> str:
    """Return the page.

    Args:
        works: pairs of a setting and the runs that show that it works.
        refused: the refused settings of each group, by the name of the group in the template.
    """
    tables = {
        group: pages.table(("setting", "reason"), [(pages.cell(c.name), pages.cell(c.reason)) for c in checks])
        for group, checks in refused.items()
    }
    return pages.fill("combinations.md.j2", works=pages.table(("setting", "shown by"), works), **tables)


def tested_combinations() -> Iterator[tuple[str, str]]:
    """Yield each setting that works and the evidence for it, from the table of the composition test."""
    sys.path.insert(0, str(TESTS))  # for the tests' package `support`
    from support.composition import TABLE

    for name, row in TABLE.items():
        yield name, row.evidence


def render_from_code() -> str:
    """Return the page, made from the tests and the refused settings."""
    from maskmoe.training.settings import refused_settings as settings

    groups = {
        "meaningless": settings.MEANINGLESS_WITH_A_MASK,
        "broken": settings.BROKEN_IN_MEGATRON,
        "not_built": settings.NOT_BUILT,
    }
    return render(tested_combinations(), groups)


if __name__ == "__main__":
    prepare_process()
    pages.write(render_from_code)
