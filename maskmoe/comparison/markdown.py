"""Tables in Markdown."""

import re
from collections.abc import Sequence


def markdown_table(text: str) -> str:
    """Return a Markdown table whose first column is aligned left and whose other columns are aligned right.

    Args:
        text: the header and the rows on one line each, with cells that are separated by `|`.
    """
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.strip()]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
