"""Renders the page of a campaign."""

import re
from operator import methodcaller

from gpu_campaign.results import Campaign
from maskmoe.comparison.report import markdown_table
from maskmoe.files.templates import render_template


def render_page(campaign: Campaign) -> str:
    """Return the page in Markdown."""
    filters = {"table": _table, "cell": _cell, "indented": methodcaller("replace", "\n", "\n    ")}
    return render_template("gpu_campaign", "campaign.md.j2", {"campaign": campaign}, filters)


def _table(text: str) -> str:
    """Return the Markdown table of a header and rows on one line each, with cells that are separated by `|`."""
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.strip()]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    return markdown_table(header, rows)


def _cell(value: object) -> str:
    """Return the text of a value in a cell of a table."""
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
