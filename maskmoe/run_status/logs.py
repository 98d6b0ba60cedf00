"""Reads the newest iteration that the logs of a run have: training writes event files only every two minutes."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from maskmoe.files.untrusted import UnusableFile, open_regular
from maskmoe.workflow.training_log import IterationRecord, ValidationRecord, parse_line

_MOST_LOGS, _MOST_BYTES = 8, 1 << 18  # the end of each of the newest logs


class NewestLines(NamedTuple):
    """The newest lines that Megatron has printed.

    Attributes:
        iteration: the newest line of an iteration; None without one.
        validation: the newest line of held-out text; None without one.
        changed: when a log was last changed, in seconds since 1970; None without logs.
    """

    iteration: IterationRecord | None
    validation: ValidationRecord | None
    changed: float | None


def read_newest_lines(run: Path) -> NewestLines:
    """Return the newest lines in `*.log` and `logs/**/*.log` of a run folder."""
    times = {}
    for path in {*run.glob("*.log"), *run.glob("logs/**/*.log")}:
        with suppress(OSError):  # a log may be removed meanwhile
            times[path] = path.stat().st_mtime
    newest = sorted(times, key=times.__getitem__)[-_MOST_LOGS:]
    iteration, validation = None, None
    for line in (line for path in newest for line in _last_lines(path)):
        with suppress(ValueError, OverflowError):  # a killed process may leave incomplete numbers
            record = parse_line(line)
            iteration = record if isinstance(record, IterationRecord) else iteration
            validation = record if isinstance(record, ValidationRecord) else validation
    return NewestLines(iteration, validation, max(times.values(), default=None))


def _last_lines(path: Path) -> Iterator[str]:
    """Yield the lines at the end of a log; nothing if the log cannot be read."""
    with suppress(UnusableFile, OSError), open_regular(path) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _MOST_BYTES))
        yield from stream.read(_MOST_BYTES).decode(errors="replace").splitlines()
