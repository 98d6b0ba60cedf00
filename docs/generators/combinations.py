"""Write the page of supported combinations: the settings that work with a routing mask, and those that are refused.

python docs/generators/combinations.py OUTPUT

Refused settings and proven flags come from `maskmoe.training.settings.support`, all other text from the template.
"""

import pages

from maskmoe.megatron_compat import prepare_process


def render() -> str:
    """Return the page, made from the refused settings and the proven flags."""
    import megatron.core

    from maskmoe.training.settings.support import KNOWN_BUGS, NEVER, proven

    never = [(pages.cell(row.flags), pages.cell(row.reason)) for row in NEVER]
    bugs = [(pages.cell(row.flags), pages.cell(row.reason), link(row.issue)) for row in KNOWN_BUGS if row.is_active]
    return pages.fill(
        "combinations.md.j2",
        version=megatron.core.__version__.partition("+")[0],
        never=pages.table(("setting", "reason"), never),
        known_bugs=pages.table(("setting", "reason", "report"), bugs),
        **{
            f"proven_{column}": ", ".join(f"`{flag}`" for flag in sorted(flags)) or "none yet"
            for column, flags in proven().items()
        },
    )


def link(issue: str) -> str:
    """Return a link to an issue or pull request of Megatron-Core, or to a report of `docs/upstream`."""
    name = issue.rpartition("/")[2].removesuffix(".md")
    return f"[{name}]({issue.removeprefix('docs/')})"


if __name__ == "__main__":
    prepare_process()
    pages.write(render)
