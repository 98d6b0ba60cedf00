"""Reads what Megatron has printed, for runs without TensorBoard's event files."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from maskmoe.files.untrusted import UnusableFile, open_regular
from maskmoe.run_report.history import History
from maskmoe.workflow.training_log import IterationRecord, ValidationRecord, parse_line

VALIDATION = "lm loss validation"
_VALUE = re.compile(r" ([A-Za-z_][A-Za-z0-9_ ()/]*): +([-+.\deE]+|nan|-?inf) \|")
# The tags of TensorBoard for values that the log names otherwise.
_TAGS = {"learning rate": "learning-rate", "grad norm": "grad-norm", "global batch size": "batch-size"}
_TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)\]")
_MOST_BYTES, _MOST_LINE_BYTES = 64 << 20, 1 << 16
_MILLISECONDS = "elapsed time per iteration (ms)"


def log_files(folder: Path) -> list[Path]:
    """Return the logs in a run folder in the order of their last changes: `*.log` there and below `logs`."""
    times = {}
    for path in {*folder.glob("*.log"), *folder.glob("logs/**/*.log")}:
        with suppress(OSError):  # a log may be removed meanwhile
            times[path] = path.stat().st_mtime
    return sorted(times, key=times.__getitem__)


def read_logs(paths: Iterable[Path], most_bytes: int = _MOST_BYTES) -> History:
    """Return the scalars in Megatron's log lines, by the tags that TensorBoard has for them.

    Args:
        paths: the logs in the order in which they were written. A log that cannot be read is skipped.
        most_bytes: size of the end of each log that is read.
    """
    history = History()
    newest = None
    for line in _lines(paths, most_bytes):
        # A killed process may leave a line whose numbers are incomplete.
        with suppress(ValueError, OverflowError):
            newest = _read_line(line, history, newest)
    return history


def _read_line(line: str, history: History, newest: int | None) -> int | None:
    """Add the values in a line to a history, and return the newest iteration.

    Args:
        line: the line.
        history: gets the values.
        newest: the newest iteration before this line.

    Raises:
        ValueError: a value is not a number.
        OverflowError: an iteration is too large.
    """
    record = parse_line(line)
    if isinstance(record, IterationRecord):
        if newest is None or record.iteration <= newest:
            history.start(record.iteration, _time_of(line))
        newest = record.iteration
        history.newest = _time_of(line) or history.newest
        history.texts["train_iters"] = str(record.total)
        for name, value in _VALUE.findall(line):
            if name == _MILLISECONDS:
                history.append("iteration-time", newest, float(value) / 1000)
            else:
                history.append(_TAGS.get(name, name), newest, float(value))
    elif isinstance(record, ValidationRecord):
        history.append(VALIDATION, record.iteration, record.loss)
    return newest


def _lines(paths: Iterable[Path], most_bytes: int) -> Iterator[str]:
    for path in paths:
        with suppress(UnusableFile, OSError), open_regular(path) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - most_bytes))
            while line := stream.readline(_MOST_LINE_BYTES):
                yield line.decode(errors="replace")


def _time_of(line: str) -> float | None:
    """Return the time at the beginning of a line of an iteration, in seconds since 1970 if it is this host's time."""
    match = _TIME.search(line)
    try:
        return match and datetime.fromisoformat(match[1]).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
