"""Finds out whether a run is alive: by its lock, its journal, and the times of its files."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskmoe.errors import one_line
from maskmoe.files.run_folder import Entry, Kind
from maskmoe.processes.folder_lock import LockState, look_at_lock
from maskmoe.run_status.progress import Progress

_MEETING_SECONDS = 300.0  # which nodes may take to start the ranks after one of the nodes was lost
# A run without a lock that writes nothing for this time, and for this number of iterations, counts as lost. A start may
# take as long before its first rank locks the folder.
_SILENT_SECONDS = 120.0
_SILENT_ITERATIONS = 10


State = Literal["running", "finished", "ended", "lost", "unknown"]
"""What a run does.

Processes of a running run work. A finished run has done all iterations. An ended run can be started again. A lost run
was killed, or its host failed: it left its lock behind, or its journal has no end. The state is unknown if nothing says
whether the run works.
"""


@dataclass(frozen=True)
class Liveness:
    """Whether a run is alive.

    Attributes:
        state: what the run does.
        reason: how this is known, a clause.
        last_sign: when the run last wrote something, in seconds since 1970; None if it has written nothing.
    """

    state: State
    reason: str
    last_sign: float | None = None


def read_liveness(
    lock_folder: Path | None, history: Sequence[Entry], last_sign: float | None, progress: Progress
) -> Liveness:
    """Return whether a run is alive.

    Args:
        lock_folder: the folder of the checkpoints, which a run locks; None if the run has none.
        history: the journal's entries about starts, ends and changes of the nodes, in the order of time.
        last_sign: when the run last wrote something, in seconds since 1970; None if it has written nothing.
        progress: how far the run is.
    """
    lock = None if lock_folder is None else look_at_lock(lock_folder)
    patience = max(_SILENT_SECONDS, _SILENT_ITERATIONS * (progress.seconds_per_iteration or 0))
    is_fresh = last_sign is not None and time.time() - last_sign < patience
    state, reason = _state(lock, lock_folder is not None, history[-1] if history else None, progress, is_fresh)
    return Liveness(state, reason, last_sign)


def _state(
    lock: LockState | None, has_checkpoints: bool, newest: Entry | None, progress: Progress, is_fresh: bool
) -> tuple[State, str]:
    """Return the state of a run, and how it is known.

    Args:
        lock: the lock of the checkpoints; None without a lock file.
        has_checkpoints: whether the run has a folder of checkpoints, and so would lock it.
        newest: the newest entry of the run's history; None without a journal.
        progress: how far the run is.
        is_fresh: whether the run wrote something recently.
    """
    if lock is not None and lock.is_alive:
        return "running", f"{_name(lock)} holds the lock"
    is_open = newest is not None and newest.kind not in (Kind.ENDED, Kind.NODES)
    if lock is None and is_open and is_fresh:
        return "running", "its journal has no end, and it wrote something a short time ago"
    if progress.is_complete:
        return "finished", "all iterations are done"
    # After a change of the nodes, the launchers of the remaining nodes start the ranks again.
    if newest is not None and newest.kind is Kind.NODES and time.time() - newest.time < _MEETING_SECONDS:
        return "running", f"its nodes meet again: {newest.text}"
    if newest is not None and newest.kind is Kind.ENDED:
        return "ended", newest.text
    if lock is not None:
        return "lost", f"{_name(lock)} has left its lock behind and is gone"
    if is_open and not has_checkpoints:
        return "lost", "its journal has no end, but it has written nothing for a while"
    if has_checkpoints:
        return "ended", "no process holds the lock"
    return ("running", "it wrote something a short time ago") if is_fresh else ("unknown", "it has no lock")


def _name(lock: LockState) -> str:
    if lock.holder is None:
        return "a process that has just started"
    return f"process {lock.holder.pid} on host {one_line(lock.holder.host)}"
