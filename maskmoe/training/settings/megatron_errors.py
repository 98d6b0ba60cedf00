"""Passes on what Megatron's own checks of the settings say, as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import extract_tb

from maskmoe.errors import UserError, reason_of


@contextmanager
def megatrons_checks(what: str = "invalid settings") -> Iterator[None]:
    """Turn any error of Megatron's code into a `UserError`.

    Most of Megatron's checks are assertions, many without a message, and the message is then the source line of the
    assertion. Other exceptions that are no checks, such as a division by zero, are quoted with their source line.

    Args:
        what: the beginning of the message.

    Raises:
        UserError: Megatron refuses the settings.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, ArithmeticError | LookupError | TypeError | AttributeError):
            reason = f"{type(error).__name__} {reason} in Megatron's line {extract_tb(error.__traceback__)[-1].line!r}"
        raise UserError(f"{what}: {reason}") from error
