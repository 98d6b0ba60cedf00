"""The parser of all command lines, which reports errors in one line and refuses abbreviated flags."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NoReturn

from maskmoe.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as `UserError`, in one line without the usage, and refuses abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise an error of the command line. Raises UserError."""
        known = self._option_string_actions
        help_flag = "--help-all" if "--help-all" in known else "--help"  # `--help` shows few of Megatron's flags
        problem, _, words = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
        if flags and not problem:
            hints = {flag: difflib.get_close_matches(flag.replace("_", "-"), known, n=1) for flag in flags}
            named = ", ".join(f"{flag} (nearest: {hint[0]})" if hint else flag for flag, hint in hints.items())
            raise UserError(f"unknown flag{'s' if len(hints) > 1 else ''} {named}; {help_flag} lists all")
        message = message.removeprefix("argument ")
        for verb in ("must", "has", "is"):
            message = message.replace(f": {verb} ", f" {verb} ", 1)
        raise UserError(f"{message} (see {self.prog} {help_flag})")


def add_option(
    group: argparse._ActionsContainer, usage: str, meaning: str, kind: Callable[[str], Any] = str, **options: Any
) -> None:
    """Add a flag that takes a value.

    Args:
        group: The parser, or the group of the flag.
        usage: The flag, and the name of its value unless the flag has choices, such as `--seed S`.
        meaning: The help, to which the default in `options` is appended.
        kind: Converts the word of the command line.
        options: Further options of argparse.
    """
    flag, _, metavar = usage.partition(" ")
    default = " (default: %(default)s)" if "default" in options else ""
    group.add_argument(flag, metavar=metavar or None, help=meaning + default, type=kind, **options)
