"""Reports what parsers find wrong in files and texts that may come from a stranger, in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from maskmoe.errors import UserError, reason_of


@contextmanager
def reading(what: str, advice: str = "replace it by an intact copy") -> Iterator[None]:
    """Turn every failure of the block into a `UserError` that names `what` was read and gives advice.

    A library in Rust may even panic, which Python sees as a BaseException.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = reason_of(error).removesuffix(f"; {advice}")
        raise UserError(f"{what} cannot be read; {advice}: {reason[:300]}") from error


def refuse_surrogates(text: str, what: str) -> None:
    """Check that UTF-8 can encode a text. Raises a UserError that names the source `what` of the text otherwise."""
    if found := re.search("[\ud800-\udfff]", text):
        raise UserError(
            f"{what} has an invalid byte or half of a surrogate pair ({found[0]!a}), which is not text: correct it"
        )


def printable_name(path: str | os.PathLike[str]) -> str:
    r"""Return the last part of a path, with bytes that are not valid UTF-8 written as `\xff`, for records."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "backslashreplace")
