"""Reads files of prompts for text generation."""

import json
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError, refused_by_system
from maskmoe.files.untrusted import refuse_surrogates

KEY = "prompt"
"""The key of the text in a record."""
_FLAG = "--prompts-file"
_JSON_LINES = ".jsonl"


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of prompts, each with a text that is not empty in the key `prompt`.

    A record of a plain line has no other key. Blank lines are skipped. Only a line feed, alone or after a carriage
    return, ends a line: other line ends of Unicode may be part of a prompt.

    Raises:
        UserError: The file cannot be read, is not text in UTF-8, holds no prompt, or a line is not a record with a
            prompt.
    """
    with refused_by_system(f"cannot read {_FLAG} {path}"):
        content = path.read_bytes()  # the file may be a pipe
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{_FLAG} {path} is not text in UTF-8") from error
    texts = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise UserError(f"{_FLAG} {path} holds no text")
    if path.suffix != _JSON_LINES:
        return [{KEY: text} for _, text in texts]
    return [_parse(text, f"line {number} of {_FLAG} {path}") for number, text in texts]


def _parse(line: str, place: str) -> dict[str, Any]:
    """Return the record in a JSON line; `place` is the number and the file of the line. Raises UserError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {str(error) or 'nested too deeply'}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object")
    if not isinstance(record.get(KEY), str) or not record[KEY].strip():
        raise UserError(f'{place} has no text in the key "{KEY}"')
    # The output repeats all keys of the record.
    refuse_surrogates(json.dumps(record, ensure_ascii=False), place)
    return record
