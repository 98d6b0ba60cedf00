"""Reads the status of a run from its folder, again and again while the run works."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from maskmoe.command_line import one_line
from maskmoe.errors import UserError
from maskmoe.journal import FOLDER, Entry, Kind, read_journal
from maskmoe.run_report.events import EventHistory
from maskmoe.run_report.facts import Arguments
from maskmoe.run_report.history import History
from maskmoe.run_report.logs import log_files, read_logs
from maskmoe.run_report.progress import Progress
from maskmoe.run_report.sources import find_event_folder
from maskmoe.run_status.checkpoints import CheckpointReader, find_checkpoints
from maskmoe.run_status.liveness import Signs, read_liveness
from maskmoe.run_status.load import read_loads
from maskmoe.run_status.starts import read_starts
from maskmoe.run_status.status import Status

# The scalars that the status shows.
_WANTED = re.compile(
    r"lm loss|lm loss validation(?!.* vs samples).*|batch-size|iteration-time|(expert|rank)_load_max_over_mean"
    r"|moe/((expert|rank)_load_max_over_mean|routing_entropy)_layer_\d+"
)
_SLOW_BYTES = 100 << 20  # of event files, which take more than a second
_FILES_OF_RUNS = ("args.yaml", "check.txt", f"{FOLDER}/*.jsonl", "logs/**/command.txt", "logs/**/rank*.log")


class StatusReader:
    """Reads the status of a run.

    Args:
        run: the run folder.
        event_folder: the folder of the event files; None to look for it in the run folder.
        checkpoints: reads the checkpoints.
        on_slow: called with a few words before something that takes seconds.
    """

    def __init__(
        self, run: Path, event_folder: Path | None, checkpoints: CheckpointReader, on_slow: Callable[[str], None]
    ) -> None:
        self._run = run
        self._event_folder = event_folder
        self._events: EventHistory | None = None
        self._checkpoints = checkpoints
        self._on_slow = on_slow

    def read(self) -> Status:
        """Return the status at this moment.

        Raises:
            UserError: the folder is no run folder.
        """
        history = self._read_history()
        entries = [_printable(entry) for entry in read_journal(self._run)]
        lock_folder = find_checkpoints(self._run, history.texts)
        if not history.series and not entries and lock_folder is None and not _has_files_of_run(self._run):
            raise UserError(f"{self._run} is not the folder of a run: it has no event files, logs or checkpoints")
        curves = history.curves()
        progress = Progress.of(history, curves)
        starts = read_starts(entries, history.starts)
        signs = Signs(history.newest, _newest_log(self._run), entries[-1].time if entries else None)
        damaged = self._events.events.damaged if self._events is not None else []
        return Status(
            name=one_line(self._run.resolve().name),
            read=time.time(),
            liveness=read_liveness(lock_folder, signs, progress, starts),
            progress=progress,
            loads=read_loads(history.series),
            starts=starts,
            warnings=_of_kind(entries, Kind.WARNED),
            nodes=_of_kind(entries, Kind.NODES),
            last_save=next(iter(_of_kind(entries, Kind.SAVED)[-1:]), None),
            checkpoints=self._checkpoints.read(lock_folder, history.texts),
            num_not_finite=sum(series.num_not_finite for series in history.series.values()),
            damaged_files=tuple(damaged),
            curves=curves,
            seq_length=Arguments(history.texts).number("seq_length"),
        )

    def _read_history(self) -> History:
        """Return what the run has logged: in event files or, without them, in its logs."""
        if self._events is None:
            folder = self._event_folder or find_event_folder(self._run)
            if folder is None:
                return read_logs(log_files(self._run))
            self._events = EventHistory(folder, lambda tag: _WANTED.fullmatch(tag) is not None)
        if self._events.events.unread_bytes() > _SLOW_BYTES:
            self._on_slow(f"reading {self._events.events.unread_bytes() / 1e6:,.0f} MB of event files")
        return self._events.update()


def _of_kind(entries: list[Entry], kind: Kind) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries if entry.kind is kind)


def _printable(entry: Entry) -> Entry:
    """Return an entry without control characters, which could change the terminal."""
    return replace(entry, text=one_line(entry.text), host=one_line(entry.host))


def _newest_log(run: Path) -> float | None:
    """Return the time of the newest change of a log in seconds since 1970; None without logs."""
    with suppress(IndexError, OSError):
        return log_files(run)[-1].stat().st_mtime
    return None


def _has_files_of_run(run: Path) -> bool:
    return any(True for pattern in _FILES_OF_RUNS for _ in run.glob(pattern))
