"""Reads what Megatron has printed, for runs without TensorBoard's event files."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from maskmoe.run_report.history import History
from maskmoe.workflow.training_log import IterationRecord, ValidationRecord, parse_line

VALIDATION = "lm loss validation"
_VALUE = re.compile(r" ([A-Za-z_][A-Za-z0-9_ ()/]*): +([-+.\deE]+|nan|-?inf) \|")
# The tags of TensorBoard for values that the log names otherwise.
_TAGS = {"learning rate": "learning-rate", "grad norm": "grad-norm", "global batch size": "batch-size"}
_MILLISECONDS = "elapsed time per iteration (ms)"


def log_files(folder: Path) -> list[Path]:
    """Return the logs in a run folder in the order of their last changes: `*.log` there and below `logs`."""
    return sorted({*folder.glob("*.log"), *folder.glob("logs/**/*.log")}, key=lambda path: path.stat().st_mtime)


def read_logs(paths: Iterable[Path]) -> History:
    """Return the scalars in Megatron's log lines, by the tags that TensorBoard has for them.

    Args:
        paths: the logs in the order in which they were written.

    Raises:
        OSError: a log cannot be read.
    """
    history = History()
    newest = None
    for line in _lines(paths):
        record = parse_line(line)
        if isinstance(record, IterationRecord):
            if newest is None or record.iteration <= newest:
                history.start(record.iteration)
            newest = record.iteration
            history.texts["train_iters"] = str(record.total)
            for name, value in _VALUE.findall(line):
                if name == _MILLISECONDS:
                    history.append("iteration-time", newest, float(value) / 1000)
                else:
                    history.append(_TAGS.get(name, name), newest, float(value))
        elif isinstance(record, ValidationRecord):
            history.append(VALIDATION, record.iteration, record.loss)
    return history


def _lines(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as lines:
            yield from lines
