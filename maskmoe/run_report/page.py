"""Writes the page of a run: a summary, plots, a table of values and the settings."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from maskmoe.files.outputs import atomic_output
from maskmoe.files.templates import render_template
from maskmoe.run_report.facts import Arguments, all_arguments, describe_run
from maskmoe.run_report.figures import draw_plots
from maskmoe.run_report.history import Curve, History
from maskmoe.run_report.progress import Progress, tokens_per_second
from maskmoe.workflow.progress import format_seconds

REPORT = "report.html"
"""The name of the page in a run folder."""

RELOAD_SECONDS = 60
"""How often a browser reloads the page of a running training."""

_MOST_ROWS = 100
_COLUMNS = {
    "lm loss": "loss",
    "lm loss validation": "held-out loss",
    "learning-rate": "learning rate",
    "grad-norm": "gradient norm",
    "expert_load_max_over_mean": "expert load",
}


def write_page(history: History, name: str, path: Path, is_running: bool | None = False) -> None:
    """Write the page of a run; the page replaces an older one at once.

    Args:
        history: what the run has logged; it may be empty.
        name: the name of the run.
        path: the file.
        is_running: whether the run trains, so that browsers reload the page; None if unknown.

    Raises:
        UserError: the file cannot be written.
        OSError: the disk is full.
    """
    curves = history.curves()
    speed = tokens_per_second(curves, Arguments(history.texts).number("seq_length"))
    num_not_finite = sum(series.num_not_finite for series in history.series.values())
    values = {
        "name": name,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "newest": history.newest and time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(history.newest)),
        "num_starts": history.num_starts,
        "num_not_finite": num_not_finite,
        "is_running": is_running,
        "reload_seconds": RELOAD_SECONDS if is_running else None,
        "summary": summarize(Progress.of(history, curves), bool(is_running)),
        "plots": draw_plots(curves, speed),
        "table": _table(curves, speed),
        "facts": describe_run(history.texts),
        "arguments": all_arguments(history.texts),
    }
    page = render_template("maskmoe.run_report", "report.html.j2", values, {})
    with atomic_output(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def summarize(progress: Progress, is_running: bool) -> dict[str, str]:
    """Return the values at the top of a page by name. Unknown values are left out.

    Args:
        progress: how far the run is.
        is_running: whether the time that is left is of interest.
    """
    summary = {}
    if progress.iteration is not None:
        of_total = f" of {progress.total:,}" if progress.total else ""
        summary["iteration"] = f"{progress.iteration:,}{of_total}"
        summary["loss"] = f"{progress.loss:.4f}"
    if progress.held_out_loss is not None:
        summary["held-out loss"] = f"{progress.held_out_loss:.4f} at iteration {progress.held_out_iteration:,}"
        summary["held-out perplexity"] = f"{np.exp(min(progress.held_out_loss, 50)):.4g}"
    if progress.tokens_per_second is not None:
        summary["speed"] = f"{progress.tokens_per_second:,.0f} tokens/s"
    if progress.tokens is not None:
        summary["tokens"] = f"{progress.tokens:,.0f}"
    if is_running and progress.seconds_left is not None:
        summary["time left"] = format_seconds(progress.seconds_left)
    return summary


def _table(curves: Mapping[str, Curve], speed: Curve | None) -> list[list[str]]:
    """Return a table of values with a header: at most `_MOST_ROWS` iterations, and the newest among them."""
    columns = {title: curves[tag] for tag, title in _COLUMNS.items() if tag in curves}
    if speed is not None:
        columns["tokens/s"] = speed
    steps = np.unique(np.concatenate([[], *(_thin(columns[title].steps) for title in list(columns)[:2])]))
    rows = [["iteration", *columns]]
    for step in steps.astype(int):
        cells = [
            f"{curve.means[index]:.6g}"
            if (index := np.searchsorted(curve.steps, step)) < len(curve) and curve.steps[index] == step
            else ""
            for curve in columns.values()
        ]
        rows.append([str(step), *cells])
    return rows


def _thin(steps: np.ndarray) -> np.ndarray:
    """Return at most half of `_MOST_ROWS` steps at equal distances, with the first and the last step."""
    return steps[np.unique(np.linspace(0, len(steps) - 1, _MOST_ROWS // 2).astype(int))]
