"""The exceptions whose text is shown to users: one line that says what is wrong, where, and what to do."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LONGEST_WORD = 240


class UserError(Exception):
    """The user's files or settings are wrong; raised before anything is changed."""


class RunFailure(Exception):  # noqa: N818 - the run fails, not the program: a disk is full, or a loss is NaN
    """A run that started well cannot continue: for example a full disk, a lost file, or a loss of NaN."""


def reason_of(error: BaseException) -> str:
    """Return the message of an exception in one line; without a message, as of most assertions, its source line."""
    if isinstance(error, KeyError):
        return f"{' '.join(str(error).split())} is missing"
    reason = (
        str(error).removesuffix("None") or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
    )
    return " ".join(reason.split())


@contextmanager
def megatrons_checks(what: str = "invalid settings") -> Iterator[None]:
    """Turn any error or exit of Megatron's code into a `UserError`, one line that begins with `what`.

    Assertions without a message, and exceptions that are no checks, are quoted with their source line.
    """
    try:
        yield
    except UserError:
        raise
    except SystemExit as end:
        raise UserError(f"{what}: Megatron ends without an error") from end
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, ArithmeticError | LookupError | TypeError | AttributeError):
            line = traceback.extract_tb(error.__traceback__)[-1].line
            reason = f"{type(error).__name__} {reason} in Megatron's line {line!r}"
        raise UserError(f"{what}: {reason}") from error


@contextmanager
def refused_by_system(what: str, cure: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError`: what failed, the system's reason, and a cure."""
    try:
        yield
    except OSError as error:
        raise UserError("; ".join(filter(None, (f"{what}: {error.strerror or error}", cure)))) from error


def one_line(message: object) -> str:
    """Return a message on one line that fits on a screen: without control characters, and with long words shortened."""
    text = "".join(c if c.isprintable() or c.isspace() else repr(c)[1:-1] for c in str(message))
    half = _LONGEST_WORD // 2
    return " ".join(word if len(word) <= _LONGEST_WORD else f"{word[:half]}…{word[-half:]}" for word in text.split())


def listed(names: Sequence[str], most: int) -> str:
    """Return names for a message, of which the first `most` are written out: `a, b and 1,024 more`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural, for messages: `1 rank`, `1,024 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
