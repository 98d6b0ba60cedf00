"""Describes the parts of a status in words, for the text and for the page."""

import time
from collections.abc import Callable
from pathlib import Path

from maskmoe.files.paths import short_path
from maskmoe.launch.journal import Entry
from maskmoe.run_status.checkpoints import Checkpoints, SavedCheckpoint
from maskmoe.run_status.liveness import State
from maskmoe.run_status.starts import RunStart
from maskmoe.run_status.status import Status
from maskmoe.workflow.progress import format_seconds


def describe_alarms(status: Status) -> list[str]:
    """Return what is wrong with the run itself, one line each."""
    alarms = []
    if status.liveness.is_silent:
        alarms.append("the run has logged nothing for much longer than an iteration takes")
    if status.num_not_finite:
        alarms.append(f"{status.num_not_finite:,} logged values are NaN or infinite, and are not drawn")
    return alarms


def describe_speed(status: Status) -> list[str]:
    """Return when the run ends if it works, and how fast it is; unknown facts are left out."""
    progress, facts = status.progress, []
    if status.liveness.state is State.RUNNING and progress.seconds_left is not None:
        end = format_time(status.read + progress.seconds_left)
        facts.append(f"ETA {format_seconds(progress.seconds_left)}, {end}")
    if progress.seconds_per_iteration is not None:
        facts.append(f"{progress.seconds_per_iteration:.3g} s an iteration")
    if progress.tokens_per_second is not None:
        facts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    return facts


def describe_start(start: RunStart) -> str:
    """Return what is known about a start."""
    words = [start.text] if start.text else []
    if start.first_iteration is not None:
        words.append(f"iterations {start.first_iteration:,} to {start.last_iteration:,}")
    elif start.last_iteration is not None:
        words.append(f"until iteration {start.last_iteration:,}")
    if start.end:
        when = "" if start.ended is None else f" {format_time(start.ended)}"
        words.append(f"ended{when}: {start.end}")
    return f"{'at an unknown time' if start.began is None else format_time(start.began)} {'; '.join(words)}"


def describe_event(entry: Entry) -> str:
    """Return an entry of the journal with its time and iteration."""
    iteration = "" if entry.iteration is None else f"iteration {entry.iteration:,}: "
    return f"{format_time(entry.time)} {iteration}{entry.text}"


def describe_soundness(checkpoint: SavedCheckpoint) -> str:
    """Return whether a checkpoint is sound, and its fault."""
    return f"{checkpoint.soundness.value}: {checkpoint.fault}" if checkpoint.fault else checkpoint.soundness.value


def describe_next_start(checkpoints: Checkpoints) -> str:
    """Return which checkpoint a restart would load."""
    if checkpoints.problem:
        return f"a restart would be refused: {checkpoints.problem}"
    if checkpoints.next_start is None:
        return "a restart begins at the first iteration"
    return f"a restart loads {checkpoints.next_start.name}"


def format_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as local date and time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def format_age(seconds: float) -> str:
    """Return how long ago something was, such as `5 min ago`; the clock of another host may be ahead."""
    if not seconds >= 1:
        return "now"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def format_size(size: int) -> str:
    """Return a size in bytes as text with a suitable unit."""
    exponent = min(4, max(0, size.bit_length() - 1) // 10)
    return f"{size / 1024**exponent:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


def filters(status: Status) -> dict[str, Callable]:
    """Return the filters that the templates of the text and of the page share."""
    return {
        "age": lambda seconds: format_age(status.read - seconds),
        "time": format_time,
        "size": format_size,
        "short": lambda path: short_path(Path(path)),
        "start": describe_start,
        "event": describe_event,
        "soundness": describe_soundness,
        "next_start": describe_next_start,
        "ratio": lambda value: "-" if value is None else f"{value:.3f}",
    }
