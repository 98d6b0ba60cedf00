"""Shows a status as plain text, and as one HTML page that loads nothing from elsewhere."""

import base64
import io
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from maskmoe.files.outputs import atomic_output, render_template
from maskmoe.run_status.status import Status

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

_MOST_LINES = 12  # of each list, the newest
_MOST_EVENTS = 200  # of the journal, the newest
_MOST_NAMES = 8  # in the legend of a plot
_MOST_POINTS = 1000  # of a curve
# The scalars of each plot, as a pattern of their tags.
_PLOTS = {
    "Loss in nats per token": r"lm loss( validation(?!.* ppl).*)?|mtp_\d+ loss",
    "Seconds per iteration": "iteration-time",
    "Learning rate": "learning-rate",
    "Gradient norm": "grad-norm",
    "Losses of the routers": r"(\w+_)?(load_balancing|z)_loss",
    "Load of the busiest expert and rank, divided by the mean": "(expert|rank)_load_max_over_mean",
    "Load of the busiest expert by layer, from dark to bright": r"moe/expert_load_max_over_mean_layer_\d+",
    "Routing entropy in nats": "routing_entropy",
    "Memory in bytes": "mem-.*bytes",
}


def render_text(status: Status) -> str:
    """Return a status as text for people."""
    values = {"status": status, "summary": summarize(status), "most": _MOST_LINES}
    return render_template("maskmoe.run_status", "status.txt.j2", values, _FILTERS)


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


# The filters that the templates of the text and of the page share.
_FILTERS: Mapping[str, Callable] = {"time": format_time, "size": lambda size: f"{size / 2**20:,.1f} MiB"}


def write_page(status: Status, path: Path) -> None:
    """Write the page of a status; the page replaces an older one at once.

    Args:
        status: The status.
        path: The file.

    Raises:
        UserError: The file cannot be written.
        OSError: The disk is full.
    """
    scalars = status.logged.scalars
    plots = {}
    for title, pattern in _PLOTS.items():
        tags = sorted((tag for tag in scalars if re.fullmatch(pattern, tag)), key=lambda tag: (len(tag), tag))
        if tags:
            plots[title] = draw_plot({tag: scalars[tag] for tag in tags})
    values = {"status": status, "summary": summarize(status), "plots": plots, "most": _MOST_EVENTS}
    page = render_template("maskmoe.run_status", "status.html.j2", values, _FILTERS)
    with atomic_output(path) as temporary:
        # Names of files may have bytes that are not UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def draw_plot(curves: Mapping[str, Sequence["ScalarEvent"]]) -> str:
    """Return a plot of scalars over iterations, an SVG image that contains everything it needs, as a `data:` URI.

    Args:
        curves: The values of each scalar by its tag.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    for (tag, values), color in zip(curves.items(), colors, strict=True):
        marker = "o" if len(values) == 1 else None  # a line needs two points
        drawn = [values[i] for i in np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS), dtype=int)]
        steps, heights = [value.step for value in drawn], [value.value for value in drawn]
        axes.plot(steps, heights, color=color, linewidth=1, marker=marker, label=tag)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= _MOST_NAMES:
        axes.legend(frameon=False)
    svg = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):  # text remains text, in the fonts of the reader
        figure.savefig(svg, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue().encode()).decode()}"
