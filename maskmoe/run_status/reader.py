"""Reads the status of a run from its folder, again and again while the run works."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from maskmoe.command_line.parser import one_line
from maskmoe.errors import UserError
from maskmoe.launch.journal import FOLDER, Entry, Kind, read_journal
from maskmoe.launch.run_folder import ARGUMENTS
from maskmoe.run_report.facts import Arguments
from maskmoe.run_status.checkpoints import CheckpointReader, find_checkpoints
from maskmoe.run_status.liveness import Signs, is_time, read_liveness
from maskmoe.run_status.load import read_loads
from maskmoe.run_status.logged import LogReader
from maskmoe.run_status.starts import read_starts
from maskmoe.run_status.status import Status

_FILES_OF_RUNS = (ARGUMENTS, "check.txt", f"{FOLDER}/*.jsonl", "logs/**/command.txt", "logs/**/rank*.log")

_MOST_CHARACTERS = 500  # of a text in the journal


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
        self._logs = LogReader(run, event_folder, on_slow)
        self._checkpoints = checkpoints

    def read(self) -> Status:
        """Return the status at this moment.

        Raises:
            UserError: the folder is no run folder.
        """
        logged = self._logs.read()
        history, progress = logged.history, logged.progress
        entries = [_printable(entry) for entry in read_journal(self._run) if is_time(entry.time)]
        folder = find_checkpoints(self._run, logged.texts)
        if not history.series and not entries and folder is None and not _has_files_of_run(self._run):
            raise UserError(f"{self._run} is not the folder of a run: it has no event files, logs or checkpoints")
        starts = read_starts(entries, history.starts)
        signs = Signs(history.newest, logged.newest_log, entries[-1].time if entries else None)
        return Status(
            name=one_line(self._run.resolve().name),
            read=time.time(),
            liveness=read_liveness(folder, signs, progress, starts, entries),
            progress=progress,
            loads=read_loads(history.series),
            starts=starts,
            warnings=_of_kind(entries, Kind.WARNED),
            nodes=_of_kind(entries, Kind.NODES),
            last_save=next(iter(_of_kind(entries, Kind.SAVED)[-1:]), None),
            checkpoints=self._checkpoints.read(folder, logged.texts),
            num_not_finite=sum(series.num_not_finite for series in history.series.values()),
            curves=history.curves(),
            seq_length=Arguments(logged.texts).number("seq_length"),
        )


def _of_kind(entries: list[Entry], kind: Kind) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries if entry.kind is kind)


def _printable(entry: Entry) -> Entry:
    """Return an entry without control characters, which could change the terminal, and of bounded length."""
    return replace(entry, text=one_line(entry.text[:_MOST_CHARACTERS]), host=one_line(entry.host[:_MOST_CHARACTERS]))


def _has_files_of_run(run: Path) -> bool:
    return any(True for pattern in _FILES_OF_RUNS for _ in run.glob(pattern))
