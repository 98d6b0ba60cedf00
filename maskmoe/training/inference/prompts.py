"""Takes the prompts of text generation from the command line or a file."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.json_files import Line, read_lines
from maskmoe.files.untrusted import refuse_surrogates

_JSON_LINES = ".jsonl"
_KEY = "prompt"


def check_prompt(prompt_ids: Sequence[int], max_new_tokens: int, positions: int | None) -> None:
    """Check that a prompt can be continued.

    Args:
        prompt_ids: The token ids of the prompt.
        max_new_tokens: The largest number of tokens that will be added.
        positions: The number of positions of the model; None if the model has no limit.

    Raises:
        UserError: The prompt has no token, or the text would be longer than the model's positions.
    """
    if not prompt_ids:
        raise UserError("the prompt is empty")
    if positions is not None and len(prompt_ids) + max_new_tokens > positions:
        raise UserError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones exceed the model's {positions} positions; "
            "shorten the prompt or lower --max-new-tokens"
        )


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of prompts, each with a text that is not empty in the key `prompt`.

    A record of a plain line has no other key. Blank lines are skipped.

    Raises:
        UserError: The file cannot be read, holds no prompt, or a line is not a record with a prompt.
    """
    is_json = path.suffix == _JSON_LINES
    return [_record_of(line) if is_json else {_KEY: line.text} for line in read_lines(path, "--prompts-file")]


def _record_of(line: Line) -> dict[str, Any]:
    record = line.parse()
    if not isinstance(record.get(_KEY), str) or not record[_KEY].strip():
        raise UserError(f'{line.place} has no text in the key "{_KEY}"')
    # The output repeats all keys of the record.
    refuse_surrogates(json.dumps(record, ensure_ascii=False), line.place)
    return record


class Prompts:
    """The prompts of a command line that are known before the model is loaded.

    Args:
        arguments: The arguments of `add_prompt_arguments`.

    Attributes:
        texts: The prompts; empty if a person will type them.

    Raises:
        UserError: The file of prompts is not usable, or the prompt is empty or not valid Unicode.
    """

    def __init__(self, arguments: Namespace) -> None:
        self._records: list[dict[str, Any]] | None = None
        if arguments.prompts_file is not None:
            self._records = read_prompts(arguments.prompts_file)
        elif arguments.prompt is not None and not arguments.prompt.strip():
            raise UserError("--prompt is empty")
        self.texts = [record[_KEY] for record in self._records or ()]
        if arguments.prompt is not None:
            refuse_surrogates(arguments.prompt, "--prompt")
            self.texts = [arguments.prompt]
        self._batch_size = arguments.prompts_per_batch

    def batches(self) -> Iterator[slice]:
        """Yield the parts of `texts` that are to be continued together."""
        for start in range(0, len(self.texts), self._batch_size):
            yield slice(start, start + self._batch_size)

    def output(self, texts: Sequence[str]) -> str:
        """Return the output of the program without its last line end.

        Args:
            texts: Each prompt with its continuation.
        """
        if self._records is None:
            return texts[0]
        records: Iterator[Mapping[str, Any]] = (
            {**record, "text": text} for record, text in zip(self._records, texts, strict=True)
        )
        return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
