"""Draws curves and bars with characters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskmoe.run_report.history import Curve

# A Braille character has 4 rows and 2 columns of dots; these are the bits of the dots.
_BRAILLE = 0x2800
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_LABEL_WIDTH = 7


@dataclass(frozen=True)
class Glyphs:
    """The characters of a drawing.

    Attributes:
        full: a filled part of a bar.
        empty: an empty part of a bar.
        point: a point of the second curve.
        dots_by_cell: rows and columns of dots in a character of the first curve.
        corner: the axes meet.
        horizontal, vertical: the axes.
        separator: a character between two parts of a line.
    """

    full: str = "█"
    empty: str = "░"
    point: str = "×"
    dots_by_cell: tuple[int, int] = (4, 2)
    corner: str = "└"
    horizontal: str = "─"
    vertical: str = "│"
    separator: str = "·"


UNICODE = Glyphs()
ASCII = Glyphs("#", ".", "x", (1, 1), "+", "-", "|", "-")


def glyphs_for(encoding: str | None) -> Glyphs:
    """Return the characters that an output with this encoding can print."""
    try:
        "█░×└─│·⣿".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def draw_bar(share: float, width: int, glyphs: Glyphs) -> str:
    """Return a bar of `width` characters, of which a share between 0 and 1 is filled."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return glyphs.full * filled + glyphs.empty * (width - filled)


def draw_curves(first: Curve, second: Curve | None, width: int, height: int, glyphs: Glyphs) -> list[str]:
    """Return the lines of a plot of one or two curves over iterations.

    Args:
        first: a curve that is drawn as a line.
        second: a curve whose points are drawn over the line; None without one.
        width: characters in a line, with the labels.
        height: lines of the plot, without the axis of the iterations.
        glyphs: the characters.
    """
    rows_by_cell, columns_by_cell = glyphs.dots_by_cell
    cells = max(1, width - _LABEL_WIDTH - 2)
    num_rows, num_columns = height * rows_by_cell, cells * columns_by_cell
    curves = [first] if second is None else [first, second]
    first_step, last_step = (int(bound([bound(curve.steps) for curve in curves])) for bound in (min, max))
    lowest, highest = (float(bound([bound(curve.means) for curve in curves])) for bound in (min, max))

    def column_of(steps: np.ndarray, columns: int) -> np.ndarray:
        return np.round((steps - first_step) / max(1, last_step - first_step) * (columns - 1)).astype(int)

    def row_of(values: np.ndarray, rows: int) -> np.ndarray:
        # Half values do not overflow.
        share = (highest / 2 - values / 2) / ((highest / 2 - lowest / 2) or 1)
        return np.round(np.clip(np.nan_to_num(share), 0, 1) * (rows - 1)).astype(int)

    # The line: each column of dots shows the mean of its points, or the value between its neighbours.
    columns = column_of(first.steps, num_columns)
    used, inverse = np.unique(columns, return_inverse=True)
    sums = np.zeros(len(used))
    np.add.at(sums, inverse, first.means / np.bincount(inverse)[inverse])
    drawn = np.arange(used[0], used[-1] + 1)
    rows = row_of(np.interp(drawn, used, sums), num_rows)
    dots = np.zeros((num_rows, num_columns), dtype=bool)
    for index, (column, row) in enumerate(zip(drawn, rows, strict=True)):
        before = rows[max(0, index - 1)]
        # Steep parts stay connected.
        start, end = sorted((row, before + (row > before) - (row < before) if index else row))
        dots[start : end + 1, column] = True
    lines = [_cells(dots[row * rows_by_cell : (row + 1) * rows_by_cell], glyphs) for row in range(height)]
    if second is not None:
        for column, row in zip(column_of(second.steps, cells), row_of(second.means, height), strict=True):
            lines[row] = lines[row][:column] + glyphs.point + lines[row][column + 1 :]
    labels = [f"{highest:.4g}", *[""] * (height - 2), f"{lowest:.4g}"] if height > 1 else [f"{highest:.4g}"]
    plot = [
        f"{label[:_LABEL_WIDTH]:>{_LABEL_WIDTH}} {glyphs.vertical}{line}".rstrip()
        for label, line in zip(labels, lines, strict=True)
    ]
    ends = f"{first_step:,}", f"{last_step:,}"
    axis = " " * (_LABEL_WIDTH + 1) + glyphs.corner + glyphs.horizontal * cells
    return [*plot, axis, " " * (_LABEL_WIDTH + 2) + ends[0] + ends[1].rjust(max(1, cells - len(ends[0])))]


def _cells(dots: np.ndarray, glyphs: Glyphs) -> str:
    """Return the characters of one line; dots: bool [rows of a cell, columns of all cells]."""
    if glyphs.dots_by_cell == (1, 1):
        return "".join("*" if dot else " " for dot in dots[0])
    bits = (dots.reshape(4, -1, 2) * _DOTS[:, None, :]).sum(axis=(0, 2))
    return "".join(chr(_BRAILLE + each) if each else " " for each in bits)


def choose_layers(values: Sequence[float | None], most: int) -> list[int]:
    """Return the indices of at most `most` layers, those with the largest values, in ascending order."""
    largest = sorted(range(len(values)), key=lambda index: -(values[index] or 0.0))[:most]
    return sorted(largest)
