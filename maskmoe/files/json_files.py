"""Reads JSON files, which pydantic validates, and writes them."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maskmoe.errors import UserError, one_line
from maskmoe.files.outputs import write_text
from maskmoe.files.untrusted import UnusableFile, read_json_bytes, type_adapter


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of any content; raise `UserError` if the file cannot be read or holds anything else."""
    return read_record(dict[str, Any], path, "replace the file by an intact copy")


def read_record[T](kind: type[T], path: Path, advice: str) -> T:
    """Read a dataclass that `write_record` has written; raise `UserError` with `advice` if the file is damaged."""
    try:
        return type_adapter(kind).validate_json(read_json_bytes(path))
    except UnusableFile as error:
        raise UserError(f"{error}; {advice}" if os.path.lexists(path) else str(error)) from error
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {advice}") from error


def write_record(record: object, path: Path) -> None:
    """Write a dataclass as a JSON file, which replaces an older file atomically."""
    # A loss may be NaN, which `dump_json` would write as null.
    content = type_adapter(type(record)).dump_python(record)
    write_text(path, json.dumps(content, indent=2) + "\n")


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of a validation on one line: its place, then what is wrong."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is missing"
    elif problem["type"] == "extra_forbidden":
        message = "is not a known key"
    elif message.startswith("Input should"):
        value = f", not {problem['input']}" if isinstance(problem["input"], str | int | float) else ""
        message = message.removeprefix("Input ") + value
    return one_line(f"{place}: {message}" if place else message)
