"""A loop over the prompts that a person types."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maskmoe.errors import UserError
from maskmoe.files.untrusted import refuse_surrogates

_UNFINISHED_CHARACTER = "\ufffd"  # what tokenizers make of the first bytes of a character


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
