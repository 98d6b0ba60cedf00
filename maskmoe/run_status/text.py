"""Shows a status as plain text, 80 characters wide."""

import textwrap
from collections.abc import Sequence

from maskmoe.files.templates import render_template
from maskmoe.run_report.progress import HELD_OUT_LOSS, LOSS
from maskmoe.run_status.plot import UNICODE, Glyphs, choose_layers, draw_bar, draw_curves
from maskmoe.run_status.status import Status
from maskmoe.run_status.words import describe_alarms, describe_speed, filters

WIDTH = 80
_BAR_WIDTH, _LOAD_BAR_WIDTH, _PLOT_HEIGHT = 20, 24, 8
_MOST_LAYERS, _MOST_EVENTS, _MOST_CHECKPOINTS = 12, 6, 8


def render_text(status: Status, glyphs: Glyphs = UNICODE) -> str:
    """Return a status as text for people; each line has at most 80 characters, unless a single word is longer.

    Args:
        status: the status.
        glyphs: the characters of drawings.
    """
    loss, held_out = status.curves.get(LOSS), status.curves.get(HELD_OUT_LOSS)
    progress = status.progress
    shown = choose_layers([load.expert for load in status.loads], _MOST_LAYERS)
    values = {
        "status": status,
        "alarms": describe_alarms(status),
        "speed": _wrap_facts(describe_speed(status), glyphs),
        "bar": "",
        "share": 0.0,
        "plot": [] if loss is None else draw_curves(loss, held_out, WIDTH, _PLOT_HEIGHT, glyphs),
        "glyphs": glyphs,
        "loads": [status.loads[index] for index in shown],
        "most_events": _MOST_EVENTS,
        "most_checkpoints": _MOST_CHECKPOINTS,
    }
    if progress.iteration is not None and progress.total:
        values["share"] = progress.iteration / progress.total
        values["bar"] = draw_bar(progress.iteration / progress.total, _BAR_WIDTH, glyphs)
    own_filters = {
        "wrap": _wrap,
        # The bar shows how far a load is above 1, and is full at 3.
        "load_bar": lambda value: "" if value is None else draw_bar((value - 1) / 2, _LOAD_BAR_WIDTH, glyphs),
    }
    text = render_template("maskmoe.run_status", "status.txt.j2", values, filters(status) | own_filters)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _wrap_facts(facts: Sequence[str], glyphs: Glyphs) -> str:
    """Join facts on as few lines as possible, without a break inside a fact."""
    unbroken = (fact.replace(" ", "\xa0") for fact in facts)
    return _wrap(f" {glyphs.separator} ".join(unbroken)).replace("\xa0", " ")


def _wrap(text: str, indent: int = 12, first: int | None = None) -> str:
    """Break a text into lines.

    Args:
        text: the text.
        indent: blanks before all lines but the first.
        first: characters that precede the text in the first line; None for `indent`.
    """
    lead = indent if first is None else first
    lines = textwrap.wrap(" " * lead + text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
    return "\n".join(lines)[lead:]
