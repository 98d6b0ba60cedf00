"""Reads JSON files that may be damaged."""

import json
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file cannot be read, or does not contain a JSON object.
    """
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise TypeError
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it does not contain a JSON object") from error
    return values
