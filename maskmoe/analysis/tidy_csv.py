"""Writes tidy CSV tables: one row for each observation, one column for each variable."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.files.outputs import atomic_output


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, atomically. A number has six significant digits, and a cell without a value is empty.

    Args:
        path: the file to write.
        columns: the names of the columns.
        rows: the cells of each row, in the order of the columns; None and NaN stand for no value.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_output(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(map(_cell, row) for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value
