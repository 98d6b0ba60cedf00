"""Reads files of prompts for text generation."""

import json
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.json_files import Line, read_lines
from maskmoe.files.untrusted import refuse_surrogates

KEY = "prompt"
"""The key of the text in a record."""
_JSON_LINES = ".jsonl"


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of prompts, each with a text that is not empty in the key `prompt`.

    A record of a plain line has no other key. Blank lines are skipped.

    Raises:
        UserError: The file cannot be read, holds no prompt, or a line is not a record with a prompt.
    """
    is_json = path.suffix == _JSON_LINES
    return [_record_of(line) if is_json else {KEY: line.text} for line in read_lines(path, "--prompts-file")]


def _record_of(line: Line) -> dict[str, Any]:
    record = line.parse()
    if not isinstance(record.get(KEY), str) or not record[KEY].strip():
        raise UserError(f'{line.place} has no text in the key "{KEY}"')
    # The output repeats all keys of the record.
    refuse_surrogates(json.dumps(record, ensure_ascii=False), line.place)
    return record
