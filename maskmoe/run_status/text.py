"""Shows a status as plain text, and has the summary and the filters that the text and the page share."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from maskmoe.files.outputs import render_template
from maskmoe.run_status.status import Status

_MOST_LINES = 12  # of each list, the newest


def render_text(status: Status) -> str:
    """Return a status as text for people."""
    values = {"status": status, "summary": summarize(status), "most": _MOST_LINES}
    return render_template("maskmoe.run_status", "status.txt.j2", values, FILTERS)


def summarize(status: Status) -> dict[str, str]:
    """Return the values at the top of a status by their names; unknown values are left out."""
    progress, summary = status.progress, {}
    if progress.iteration is not None:
        of_total = f" of {progress.total:,}" if progress.total else ""
        summary["iteration"] = f"{progress.iteration:,}{of_total}"
    if progress.loss is not None:
        summary["loss"] = f"{progress.loss:.4f}"
    if progress.held_out_loss is not None:
        summary["held-out"] = f"{progress.held_out_loss:.4f} at iteration {progress.held_out_iteration:,}"
    speed = []
    if progress.seconds_per_iteration is not None:
        speed.append(f"{progress.seconds_per_iteration:.3g} s an iteration")
    if progress.tokens_per_second is not None:
        speed.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if speed:
        summary["speed"] = ", ".join(speed)
    if status.liveness.state == "running" and progress.seconds_left is not None:
        seconds = round(progress.seconds_left)
        summary["ETA"] = f"{timedelta(seconds=seconds)}, {format_time(status.read + seconds)}"
    return summary


def format_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


FILTERS: Mapping[str, Callable] = {
    "time": format_time,
    "size": lambda size: f"{size / 2**20:,.1f} MiB",
    "ratio": lambda value: "-" if value is None else f"{value:.3f}",
}
"""The filters that the templates of the text and of the page share."""
