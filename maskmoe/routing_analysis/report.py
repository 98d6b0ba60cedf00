"""Writes all files of an analysis."""

import json
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.routing_analysis.analysis import Analysis
from maskmoe.routing_analysis.plots import write_plots
from maskmoe.routing_analysis.summary import summarise
from maskmoe.routing_analysis.tables import write_tables


def write_results(analysis: Analysis, folder: Path) -> list[Path]:
    """Write routing.json, the tables and the plots, and return the paths of the files.

    Args:
        analysis: the results.
        folder: an existing folder.

    Raises:
        UserError: a file cannot be written.
    """
    summary = folder / "routing.json"
    with atomic_output(summary) as path:
        content = json.dumps(summarise(analysis), indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(content + "\n", encoding="utf-8")
    return [summary, *write_tables(analysis, folder), *write_plots(analysis, folder)]
