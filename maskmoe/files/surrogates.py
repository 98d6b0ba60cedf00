r"""Handles text that UTF-8 cannot encode: refuses such text, and makes such names printable.

Python decodes a byte that is not valid UTF-8, in a name or on the command line, to half of a surrogate pair. JSON has
escapes such as `\ud800` for half of a pair.
"""

import json
import os
import re
from typing import Any

from maskmoe.errors import UserError

_HALF_OF_PAIR = re.compile("[\ud800-\udfff]")


def has_surrogates(text: str) -> bool:
    """Return whether a text has half of a surrogate pair, which UTF-8 cannot encode."""
    return _HALF_OF_PAIR.search(text) is not None


def refuse_surrogates(text: str, what: str) -> None:
    """Check that UTF-8 can encode a text.

    Args:
        text: the text.
        what: the source of the text, for the error.

    Raises:
        UserError: the text has half of a surrogate pair.
    """
    if found := _HALF_OF_PAIR.search(text):
        raise UserError(
            f"{what} has an invalid byte or half of a surrogate pair ({found[0]!a}), which is not text: correct it"
        )


def printable_texts(value: Any) -> Any:
    r"""Return a JSON value in whose texts each half of a surrogate pair is an escape such as `\udcff`, for records."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(_HALF_OF_PAIR.sub(lambda half: rf"\\u{ord(half[0]):x}", text))


def printable_name(path: str | os.PathLike[str]) -> str:
    r"""Return the last part of a path, with bytes that are not valid UTF-8 written as `\xff`, for records."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "backslashreplace")
