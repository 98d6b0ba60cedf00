"""Finds out whether a run is alive: by its lock, its journal, and the times of its files."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from maskmoe.errors import one_line
from maskmoe.launch.journal import Entry, Kind
from maskmoe.processes.folder_lock import LockState, look_at_lock
from maskmoe.run_report.progress import Progress
from maskmoe.run_status.starts import RunStart
from maskmoe.workflow.progress import format_seconds

_MOST_SECONDS = 1e11  # the year 5138
_MEETING_SECONDS = 300.0  # which nodes may take to start the ranks after one of the nodes was lost
# A run that writes nothing for this time, and for this number of iterations, is silent. Event files are written every
# two minutes, and a start may take as long before its first rank locks the folder.
_SILENT_SECONDS = 120.0
_SILENT_ITERATIONS = 10


class State(StrEnum):
    """The states of a run.

    Attributes:
        RUNNING: processes of the run work.
        FINISHED: all iterations are done.
        ENDED: the run ended before its last iteration, and it can be started again.
        LOST: the run was killed, or its host failed: it left its lock behind, or its journal has no end.
        UNKNOWN: nothing says whether the run works.
    """

    RUNNING = "running"
    FINISHED = "finished"
    ENDED = "ended"
    LOST = "lost"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Liveness:
    """Whether a run is alive.

    Attributes:
        state: what the run does.
        reason: how this is known, a clause.
        holder: the process that holds the lock of the checkpoints, or has left it behind, in words; empty if there is
            no lock.
        last_sign: when the run last wrote something, in seconds since 1970; None if it has written nothing.
        last_sign_of: what the run wrote then.
        is_silent: whether a running run has logged nothing for much longer than an iteration takes.
    """

    state: State
    reason: str
    holder: str = ""
    last_sign: float | None = None
    last_sign_of: str = ""
    is_silent: bool = False


@dataclass(frozen=True)
class Signs:
    """The times at which a run wrote something, in seconds since 1970; None for what it has not written.

    Attributes:
        record: the newest record of an event file or line of an iteration.
        log: the newest change of a log.
        journal: the newest entry of the journal.
    """

    record: float | None
    log: float | None
    journal: float | None

    def newest(self, lock: LockState | None) -> tuple[float | None, str]:
        """Return the time of the newest sign, and what it is."""
        times = {"record": self.record, "line of a log": self.log, "entry of the journal": self.journal}
        # The holder of a lock touches it every few seconds.
        times["touch of the lock"] = None if lock is None else lock.touched
        known = [(seconds, name) for name, seconds in times.items() if seconds is not None and is_time(seconds)]
        return max(known, default=(None, ""))


def read_liveness(
    lock_folder: Path | None, signs: Signs, progress: Progress, starts: Sequence[RunStart], entries: Sequence[Entry]
) -> Liveness:
    """Return whether a run is alive.

    Args:
        lock_folder: the folder of the checkpoints, which a run locks; None if the run has none.
        signs: when the run wrote something.
        progress: how far the run is.
        starts: the starts of the run.
        entries: the journal in the order of time.
    """
    lock = None if lock_folder is None else look_at_lock(lock_folder)
    last_sign, last_sign_of = signs.newest(lock)
    holder = "" if lock is None else _name(lock)
    state, reason = _state(lock, lock_folder is not None, last_sign, progress, starts)
    if state in (State.LOST, State.ENDED) and (change := _regrouping(entries)):
        state, reason = State.RUNNING, f"its nodes meet again: {change}"
    is_silent = False
    if state is State.RUNNING and signs.record is not None:
        newest_work = max(signs.record, signs.log or 0, signs.journal or 0)
        is_silent = time.time() - newest_work > _patience(progress)
    return Liveness(state, reason, holder, last_sign, last_sign_of, is_silent)


def _state(
    lock: LockState | None,
    has_checkpoints: bool,
    last_sign: float | None,
    progress: Progress,
    starts: Sequence[RunStart],
) -> tuple[State, str]:
    if lock is not None and lock.is_alive:
        return State.RUNNING, f"{_name(lock)} holds the lock"
    age = None if last_sign is None else time.time() - last_sign
    newest = starts[-1] if starts else None
    if lock is None and newest is not None and newest.is_recorded and newest.ended is None:
        if age is not None and age < _patience(progress):
            return State.RUNNING, "its journal has no end, and it wrote something a short time ago"
        # A run that locks its checkpoints leaves the lock behind when it is killed. Torchrun writes no end.
        if not progress.is_complete and not has_checkpoints:
            return State.LOST, "its journal has no end, but it has written nothing for a while"
    if progress.is_complete:
        return State.FINISHED, "all iterations are done"
    if lock is not None:
        return State.LOST, f"{_name(lock)} has left its lock behind and is gone"
    if newest is not None and newest.ended is not None:
        return State.ENDED, newest.end
    if has_checkpoints:
        return State.ENDED, "no process holds the lock"
    if age is not None and age < _patience(progress):
        return State.RUNNING, "it wrote something a short time ago"
    ago = "" if age is None else f" and wrote nothing for {format_seconds(max(0.0, age))}"
    return State.UNKNOWN, f"it has no lock{ago}"


def _patience(progress: Progress) -> float:
    """Return for how many seconds a running run may write nothing."""
    return max(_SILENT_SECONDS, _SILENT_ITERATIONS * (progress.seconds_per_iteration or 0))


def is_time(seconds: float) -> bool:
    """Return whether a number of seconds since 1970 can be a time of a run; damaged files have others."""
    return 0 <= seconds < _MOST_SECONDS


def _regrouping(entries: Sequence[Entry]) -> str:
    """Return the newest change of the nodes if the launchers of the remaining nodes start the ranks again, else ""."""
    changes = [entry for entry in entries if entry.kind in (Kind.STARTED, Kind.ENDED, Kind.NODES)]
    is_new = bool(changes) and changes[-1].kind is Kind.NODES and time.time() - changes[-1].time < _MEETING_SECONDS
    return changes[-1].text if is_new else ""


def _name(lock: LockState) -> str:
    if lock.holder is None:
        return "a process that has just started"
    return f"process {lock.holder.pid} on host {one_line(lock.holder.host)}"
