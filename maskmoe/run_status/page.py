"""Writes a status as an HTML page that loads nothing from elsewhere, like report.html."""

from pathlib import Path

from maskmoe.files.outputs import atomic_output
from maskmoe.files.templates import render_template
from maskmoe.run_report.figures import draw_plots
from maskmoe.run_report.page import summarize
from maskmoe.run_report.progress import tokens_per_second
from maskmoe.run_status.liveness import State
from maskmoe.run_status.status import Status
from maskmoe.run_status.words import describe_alarms, filters, format_time

_MOST_EVENTS = 200  # of the journal, the newest


def write_status_page(status: Status, path: Path, reload_seconds: int | None = None) -> None:
    """Write the page of a status; the page replaces an older one at once.

    Args:
        status: the status.
        path: the file.
        reload_seconds: how often a browser reloads the page, because it will be replaced; None for never.

    Raises:
        UserError: the file cannot be written.
        OSError: the disk is full.
    """
    is_running = status.liveness.state is State.RUNNING
    summary = summarize(status.progress, is_running)
    if is_running and status.progress.seconds_left is not None:
        summary["ETA"] = format_time(status.read + status.progress.seconds_left)
    values = {
        "name": status.name,
        "status": status,
        "most_events": _MOST_EVENTS,
        "alarms": describe_alarms(status),
        "reload_seconds": reload_seconds,
        "summary": summary,
        "plots": draw_plots(status.curves, tokens_per_second(status.curves, status.seq_length)),
    }
    page = render_template("maskmoe.run_status", "status.html.j2", values, filters(status), "maskmoe.run_report")
    with atomic_output(path) as temporary:
        # Names of files may have bytes that are not UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
