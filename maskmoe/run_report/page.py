"""Writes the page of a run: a summary, plots, a table of values and the settings."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from maskmoe.outputs import atomic_output
from maskmoe.run_report.events import CLOCK_TIME
from maskmoe.run_report.facts import Arguments, all_arguments, describe_run
from maskmoe.run_report.figures import draw_plots
from maskmoe.run_report.history import Curve, History
from maskmoe.templates import render_template
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


def write_page(history: History, name: str, path: Path, is_running: bool = False) -> None:
    """Write the page of a run; the page replaces an older one at once.

    Args:
        history: what the run has logged; it may be empty.
        name: the name of the run.
        path: the file.
        is_running: whether browsers reload the page, because it will be replaced.

    Raises:
        UserError: the file cannot be written.
        OSError: the disk is full.
    """
    arguments = Arguments(history.texts)
    curves = history.curves()
    speed = _tokens_per_second(curves, arguments.number("seq_length"))
    num_not_finite = sum(series.num_not_finite for series in history.series.values())
    values = {
        "name": name,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "newest": history.newest and time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(history.newest)),
        "num_starts": history.num_starts,
        "num_not_finite": num_not_finite,
        "reload_seconds": RELOAD_SECONDS if is_running else None,
        "summary": _summary(curves, speed, arguments, is_running),
        "plots": draw_plots(curves, speed),
        "table": _table(curves, speed),
        "facts": describe_run(history.texts),
        "arguments": all_arguments(history.texts),
    }
    page = render_template("maskmoe.run_report", "report.html.j2", values, {})
    with atomic_output(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _tokens_per_second(curves: Mapping[str, Curve], seq_length: int | None) -> Curve | None:
    """Return the speed of all ranks together; None if it is unknown."""
    times, batches = curves.get("iteration-time", curves.get(CLOCK_TIME)), curves.get("batch-size")
    if times is None or batches is None or seq_length is None:
        return None
    batch = np.array([batches.value_at(step) or batches.means[-1] for step in times.steps])
    tokens = batch * seq_length  # [points], tokens of one iteration
    return Curve(times.steps, *(tokens / np.maximum(each, 1e-9) for each in (times.means, times.highs, times.lows)))


def _summary(
    curves: Mapping[str, Curve], speed: Curve | None, arguments: Arguments, is_running: bool
) -> dict[str, str]:
    """Return the values at the top of the page by name. Unknown values are left out."""
    summary = {}
    loss, held_out = curves.get("lm loss"), curves.get("lm loss validation")
    total = arguments.number("train_iters")
    if loss is not None:
        done = int(loss.steps[-1])
        summary["iteration"] = f"{done:,} of {total:,}" if total else f"{done:,}"
        summary["loss"] = f"{loss.means[-1]:.4f}"
    if held_out is not None:
        summary["held-out loss"] = f"{held_out.means[-1]:.4f} at iteration {held_out.steps[-1]:,}"
        summary["held-out perplexity"] = f"{np.exp(min(held_out.means[-1], 50)):.4g}"
    if speed is not None:
        # The first iteration is slow, as it includes preparations.
        recent = float(np.median(speed.means[1:][-100:] if len(speed) > 1 else speed.means))
        summary["speed"] = f"{recent:,.0f} tokens/s"
        batches, seq_length = curves["batch-size"], arguments.number("seq_length") or 0
        trained = float(np.sum(np.diff(batches.steps, prepend=0) * batches.means)) * seq_length
        summary["tokens"] = f"{trained:,.0f}"
        if is_running and loss is not None and total:
            left = (total - int(loss.steps[-1])) * float(batches.means[-1]) * seq_length / recent
            summary["time left"] = format_seconds(left)
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
