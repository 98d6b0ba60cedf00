"""Renders the page of a campaign."""

from operator import methodcaller

from gpu_campaign.results import Campaign
from maskmoe.comparison.report import markdown_table
from maskmoe.files.outputs import render_template


def render_page(campaign: Campaign) -> str:
    """Return the page in Markdown."""
    filters = {"table": markdown_table, "cell": _cell, "indented": methodcaller("replace", "\n", "\n    ")}
    return render_template("gpu_campaign", "campaign.md.j2", {"campaign": campaign}, filters)


def _cell(value: object) -> str:
    """Return the text of a value in a cell of a table."""
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
