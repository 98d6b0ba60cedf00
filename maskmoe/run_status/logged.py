"""Reads what a run has logged: event files, and for the newest iterations its logs."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from maskmoe.files.untrusted import UnusableFile, read_bounded
from maskmoe.launch.run_folder import ARGUMENTS
from maskmoe.run_report.events import EventHistory
from maskmoe.run_report.history import History
from maskmoe.run_report.logs import log_files, read_logs
from maskmoe.run_report.progress import Progress
from maskmoe.run_report.sources import find_event_folder

# The scalars that the status shows.
_WANTED = re.compile(
    r"lm loss|lm loss validation(?!.* vs samples).*|batch-size|iteration-time|(expert|rank)_load_max_over_mean"
    r"|moe/((expert|rank)_load_max_over_mean|routing_entropy)_layer_\d+"
)
_ARGUMENT = re.compile(r"# (\w+): (.*)")
_MOST_ARGUMENT_BYTES = 1 << 20
_SLOW_BYTES = 10 << 20  # of event files, which take about three seconds
_TAIL_BYTES, _MOST_TAILS = 1 << 18, 8


@dataclass(frozen=True)
class Logged:
    """The values and arguments that a run has logged.

    Attributes:
        history: the values that the event files have or, without event files, the logs.
        progress: how far the run is. Training writes event files from time to time only, so the newest iterations and
            losses may be those of the logs.
        texts: the arguments of the run by name.
        newest_log: when a log was last changed, in seconds since 1970; None without logs.
    """

    history: History
    progress: Progress
    texts: dict[str, str]
    newest_log: float | None


class LogReader:
    """Reads what a run has logged, again and again.

    Args:
        run: the run folder.
        event_folder: the folder of the event files; None to look for it in the run folder.
        on_slow: called with a few words before something that takes seconds.
    """

    def __init__(self, run: Path, event_folder: Path | None, on_slow: Callable[[str], None]) -> None:
        self._run = run
        self._event_folder = event_folder
        self._events: EventHistory | None = None
        self._on_slow = on_slow

    def read(self) -> Logged:
        """Return what the run has logged so far."""
        logs = log_files(self._run)
        newest_log = None
        with suppress(IndexError, OSError):
            newest_log = logs[-1].stat().st_mtime
        history = self._read_events()
        texts = history.texts | _read_arguments(self._run)
        if not history.series:
            history = read_logs(logs)
            history.texts |= texts
            return Logged(history, Progress.of(history, history.curves()), history.texts, newest_log)
        history.texts |= texts
        progress = Progress.of(history, history.curves())
        if newest_log is not None and (history.newest is None or newest_log >= history.newest - 1):
            tail = read_logs(logs[-_MOST_TAILS:], _TAIL_BYTES)
            progress = _newer(progress, Progress.of(tail, tail.curves()))
        return Logged(history, progress, texts, newest_log)

    def _read_events(self) -> History:
        """Return what the event files hold."""
        if self._events is None:
            folder = self._event_folder or find_event_folder(self._run)
            if folder is None:
                return History()
            self._events = EventHistory(folder, lambda tag: _WANTED.fullmatch(tag) is not None)
        events = self._events.events
        if events.unread_bytes() > _SLOW_BYTES:
            self._on_slow(f"reading {events.unread_bytes() / 1e6:,.0f} MB of event files")
        return self._events.update()


def _newer(events: Progress, logs: Progress) -> Progress:
    """Return the progress of the event files with the losses of the logs, as far as these are newer."""
    if logs.iteration is not None and (events.iteration is None or logs.iteration > events.iteration):
        events = replace(events, iteration=logs.iteration, loss=logs.loss, total=events.total or logs.total)
    if (logs.held_out_iteration or 0) > (events.held_out_iteration or 0):
        events = replace(events, held_out_iteration=logs.held_out_iteration, held_out_loss=logs.held_out_loss)
    return events


def _read_arguments(run: Path) -> dict[str, str]:
    """Return the arguments of the newest start by name, in the form in which event files have them."""
    try:
        text = read_bounded(run / ARGUMENTS, _MOST_ARGUMENT_BYTES).decode(errors="replace")
    except UnusableFile:
        return {}
    return {match[1]: match[2] for line in text.splitlines() if (match := _ARGUMENT.fullmatch(line))}
