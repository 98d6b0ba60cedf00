"""Takes the prompts of text generation from the command line, a file, or a person who types them."""

import json
import signal
import sys
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from maskmoe.command_line import ranges
from maskmoe.errors import UserError
from maskmoe.files.json_lines import Line, read_lines
from maskmoe.files.surrogates import refuse_surrogates

INTERACTIVE_FLAG = "--interactive"
"""The flag that starts a prompt loop."""

_JSON_LINES = ".jsonl"
_KEY = "prompt"
_UNFINISHED_CHARACTER = "\ufffd"  # what tokenizers make of the first bytes of a character


def add_prompt_arguments(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Add `--prompt`, `--prompts-file` and `--interactive`, exactly one of which is needed, and `--batch-size`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help=f"file of texts to continue: one text a line, or JSON lines with the key `{_KEY}` if the name ends in "
        f"`{_JSON_LINES}`. The output is JSON lines with the key `text`",
    )
    source.add_argument(
        INTERACTIVE_FLAG,
        action="store_true",
        help="continue each line of stdin; Ctrl-C ends a text, the end of the input (Ctrl-D) ends the program",
    )
    parser.add_argument(
        "--batch-size",
        dest="prompts_per_batch",
        type=ranges.BATCH_SIZE,
        default=8,
        metavar="N",
        help="continue this many texts of --prompts-file at a time",
    )


def check_prompt(prompt_ids: Sequence[int], max_new_tokens: int, positions: int | None) -> None:
    """Check that a prompt can be continued.

    Args:
        prompt_ids: the token ids of the prompt.
        max_new_tokens: the largest number of tokens that will be added.
        positions: the number of positions of the model; None if the model has no limit.

    Raises:
        UserError: the prompt has no token, or the text would be longer than the model's positions.
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
        UserError: the file cannot be read, holds no prompt, or a line is not a record with a prompt.
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
        arguments: the arguments of `add_prompt_arguments`.

    Attributes:
        texts: the prompts; empty if a person will type them.

    Raises:
        UserError: the file of prompts is not usable, or the prompt is empty or not valid Unicode.
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
            texts: each prompt with its continuation.
        """
        if self._records is None:
            return texts[0]
        records: Iterator[Mapping[str, Any]] = (
            {**record, "text": text} for record, text in zip(self._records, texts, strict=True)
        )
        return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


class PromptLoop:
    """Reads prompts from stdin, and writes their continuations to stdout while they grow.

    Ctrl-C ends only the continuation in progress. The first prompt is asked for when it is read.
    """

    def __init__(self) -> None:
        # Decode a byte that is not valid UTF-8 to half of a surrogate pair, instead of failing.
        self._input = open(0, encoding="utf-8-sig", errors="surrogateescape", newline="\n", closefd=False)  # noqa: SIM115 - as long as the loop
        self._is_person = self._input.isatty()
        # The program may have redirected `sys.stdout`.
        self._output = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - as long as the loop
        self._written = ""
        self._is_answering = False
        self.is_interrupted = False
        signal.signal(signal.SIGINT, self._interrupt)
        self._ask()

    def next(self) -> str | None:
        """Return the next prompt; None at the end of the input. Prompts that are not valid Unicode are refused.

        Raises:
            UserError: stdin cannot be read.
        """
        while line := self._read_line():
            if not (prompt := line.removesuffix("\n").rstrip("\r")):
                self._ask()
                continue
            try:
                refuse_surrogates(prompt, "the prompt")
            except UserError as error:
                self.refuse(error)
            else:
                return prompt
        return None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Take Ctrl-C as the end of the continuation that grows in this block, then ask for the next prompt."""
        self._written, self.is_interrupted, self._is_answering = "", False, True
        try:
            yield
        finally:
            self._is_answering = False
            self._write("\n")
            self._ask()

    def show(self, text: str) -> None:
        """Write what is new in a growing text. The last character is left to a later call if it is incomplete."""
        text = text.rstrip(_UNFINISHED_CHARACTER)
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text

    def refuse(self, error: UserError) -> None:
        """Report that a prompt cannot be continued, and ask for the next."""
        print(f"error: {error}", file=sys.stderr, flush=True)
        self._ask()

    def _read_line(self) -> str:
        try:
            return self._input.readline()
        except OSError as error:
            raise UserError(f"cannot read prompts from stdin: {error.strerror}") from error

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.is_interrupted = True
        if not self._is_answering:
            print("\n(Ctrl-D ends the program)", file=sys.stderr)
            self._ask()

    def _ask(self) -> None:
        if self._is_person:
            print("> ", end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()
