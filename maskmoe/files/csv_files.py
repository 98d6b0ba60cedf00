"""Writes CSV files."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from maskmoe.files.outputs import atomic_output


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, atomically. A number has six significant digits, and a cell without a value is empty.

    Args:
        path: The file to write.
        columns: The names of the columns.
        rows: The cells of each row, in the order of the columns; None and NaN stand for no value.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_output(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        # Lines end with "\r\n": Python before 3.12.3 does not quote a "\r" in a cell if lines end with "\n".
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(map(_cell, row) for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
