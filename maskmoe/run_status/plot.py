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


@np.errstate(over="ignore", invalid="ignore")  # damaged files have values of any size
def draw_curves(first: Curve, second: Curve | None, width: int, height: int, glyphs: Glyphs) -> list[str]:
    """Return the lines of a plot of one or two curves over iterations.

    As in report.html, the values have a logarithmic axis if they differ by a factor of 2.

    Args:
        first: a curve that is drawn as a line.
        second: a curve whose points are drawn over the line; None without one.
        width: characters in a line, with the labels.
        height: lines of the plot, without the axis of the iterations.
        glyphs: the characters.
    """
    rows_by_cell, columns_by_cell = glyphs.dots_by_cell
    cells = max(1, width - _LABEL_WIDTH - 2)
    steps = [first.steps] if second is None else [first.steps, second.steps]
    first_step, last_step = (int(bound([bound(each) for each in steps])) for bound in (min, max))

    def column_of(steps: np.ndarray, columns: int) -> np.ndarray:
        return np.round((steps - first_step) / max(1, last_step - first_step) * (columns - 1)).astype(int)

    # Each column of dots shows the mean of its points, or a value on the line between its neighbours.
    columns = column_of(first.steps, cells * columns_by_cell)
    used, inverse = np.unique(columns, return_inverse=True)
    means = np.zeros(len(used))
    np.add.at(means, inverse, first.means / np.bincount(inverse)[inverse])
    drawn = np.arange(used[0], used[-1] + 1)
    values = np.interp(drawn, used, means)
    shown = values if second is None else np.concatenate([values, second.means])
    lowest, highest = float(shown.min()), float(shown.max())
    # Half values do not overflow.
    scale = np.log if lowest > 0 and highest > 2 * lowest else lambda values: values / 2
    top, bottom = scale(highest), scale(lowest)

    def row_of(values: np.ndarray, rows: int) -> np.ndarray:
        share = (top - scale(values)) / ((top - bottom) or 1)
        return np.round(np.clip(np.nan_to_num(share), 0, 1) * (rows - 1)).astype(int)

    rows = row_of(values, height * rows_by_cell)
    dots = np.zeros((height * rows_by_cell, cells * columns_by_cell), dtype=bool)
    for index, (column, row) in enumerate(zip(drawn, rows, strict=True)):
        before = rows[max(0, index - 1)]
        # Fill steep parts up to the row beside the point before, so that the line has no gaps.
        start, end = sorted((row, before + (row > before) - (row < before)))
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
