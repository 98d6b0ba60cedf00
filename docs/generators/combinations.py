"""Write the page of supported combinations: the settings that work with a routing mask, and those that are refused.

python docs/generators/combinations.py OUTPUT

The refused settings come from `maskmoe.training.settings.refused_settings`. All other text is in combinations.md.j2.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import pages

from maskmoe.megatron_compat import prepare_process


class Check(Protocol):
    """A refused setting, as `maskmoe.training.settings.refused_settings` defines it."""

    name: str
    reason: str


def render(refused: Mapping[str, Iterable[Check]]) -> str:
    """Return the page.

    Args:
        refused: the refused settings of each group, by the name of the group in the template.
    """
    tables = {
        group: pages.table(("setting", "reason"), [(pages.cell(c.name), pages.cell(c.reason)) for c in checks])
        for group, checks in refused.items()
    }
    return pages.fill("combinations.md.j2", **tables)


def render_from_code() -> str:
    """Return the page, made from the refused settings."""
    from maskmoe.training.settings import refused_settings as settings

    groups = {
        "meaningless": settings.MEANINGLESS_WITH_A_MASK,
        "broken": settings.BROKEN_IN_MEGATRON,
        "not_built": settings.NOT_BUILT,
    }
    return render(groups)


if __name__ == "__main__":
    prepare_process()
    pages.write(render_from_code)
