"""Writes a status as one HTML page that loads nothing from elsewhere: `python -m maskmoe.run_status.page RUN FILE`."""

import base64
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskmoe.files.outputs import atomic_output, render_template
from maskmoe.run_status.status import Status, read_status
from maskmoe.run_status.text import FILTERS, summarize

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

REPORT = "report.html"
"""The name of the page that a training writes into its run folder."""

_MOST_EVENTS = 200  # of the journal, the newest
_MOST_NAMES = 8  # in the legend of a plot
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


def write_page(status: Status, path: Path) -> None:
    """Write the page of a status; the page replaces an older one at once.

    Args:
        status: the status.
        path: the file.

    Raises:
        UserError: the file cannot be written.
        OSError: the disk is full.
    """
    scalars = status.logged.scalars
    plots = {}
    for title, pattern in _PLOTS.items():
        tags = sorted((tag for tag in scalars if re.fullmatch(pattern, tag)), key=lambda tag: (len(tag), tag))
        if tags:
            plots[title] = draw_plot({tag: scalars[tag] for tag in tags})
    values = {"status": status, "summary": summarize(status), "plots": plots, "most": _MOST_EVENTS}
    page = render_template("maskmoe.run_status", "status.html.j2", values, FILTERS)
    with atomic_output(path) as temporary:
        # Names of files may have bytes that are not UTF-8.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def draw_plot(curves: Mapping[str, Sequence["ScalarEvent"]]) -> str:
    """Return a plot of scalars over iterations, an SVG image that contains everything it needs, as a `data:` URI.

    Args:
        curves: the values of each scalar by its tag.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    for (tag, values), color in zip(curves.items(), colors, strict=True):
        marker = "o" if len(values) == 1 else None  # a line needs two points
        steps, heights = [value.step for value in values], [value.value for value in values]
        axes.plot(steps, heights, color=color, linewidth=1, marker=marker, label=tag)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= _MOST_NAMES:
        axes.legend(frameon=False)
    svg = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):  # text remains text, in the fonts of the reader
        figure.savefig(svg, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue().encode()).decode()}"


if __name__ == "__main__":
    write_page(read_status(Path(sys.argv[1])), Path(sys.argv[2]))
