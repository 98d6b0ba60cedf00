r"""Reads text files of one text a line, and JSON lines: one JSON object a line. Blank lines are skipped.

Only `\n` and `\r\n` end a line. Other characters that Unicode counts as line ends may be part of a text.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from maskmoe.errors import UserError


class Line(NamedTuple):
    """A line of a file.

    Attributes:
        place: the line's number and file, for error messages.
        text: the line without its end.
    """

    place: str
    text: str

    def parse(self) -> dict[str, Any]:
        """Return the JSON object in the line.

        Raises:
            UserError: the line is not a JSON object.
        """
        try:
            content = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.place} is not JSON: {str(error) or 'nested too deeply'}") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.place} is not a JSON object")
        return content


def read_lines(path: Path, flag: str) -> list[Line]:
    """Return the lines of a text file that are not blank.

    Args:
        path: the file.
        flag: the flag that names the file, for error messages.

    Raises:
        UserError: the file cannot be read, is not text in UTF-8, or has blank lines only.
    """
    name = f"{flag} {path}"
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8") from error
    found = [
        Line(f"line {number} of {name}", line.removesuffix("\r"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{name} holds no text")
    return found
