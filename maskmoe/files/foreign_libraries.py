"""Calls of libraries that read files of unknown content: whatever such a library raises becomes one line of error."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from maskmoe.errors import UserError


@contextmanager
def reading(what: str, advice: str = "replace it by an intact copy") -> Iterator[None]:
    """Turn every failure of the block into an error that names what was read.

    Args:
        what: the thing that the block reads, such as "the tokenizer of model/".
        advice: what the user can do.

    Raises:
        UserError: the block failed. A library in Rust may even panic, which Python sees as a BaseException.
    """
    try:
        with _hiding_messages_of_failures():
            yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()).removesuffix(f"; {advice}") or type(error).__name__
        raise UserError(f"{what} cannot be read; {advice}: {reason[:300]}") from error


@contextmanager
def _hiding_messages_of_failures() -> Iterator[None]:
    """Hold back what the block prints on stderr, and drop it if the block fails: a panic prints several lines."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as messages:
        kept = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            yield
            sys.stderr.flush()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        messages.seek(0)
        os.write(2, messages.read())
