"""The parser of all command lines: it reports an error in one line, and checks the range of each number."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from maskmoe.errors import UserError

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,300}")
_SHARE = r"([0-9]+\.?[0-9]*|\.[0-9]+)"
_SPLIT = re.compile(rf"[\[(\s]*{_SHARE}(\s*[,/\s]\s*{_SHARE}){{0,2}}[\])\s]*")


@dataclass(frozen=True)
class WholeNumber:
    """The `type` of a command line argument that is a whole number in a range.

    Attributes:
        least: the smallest value.
        most: the largest value.
    """

    least: int
    most: int = (1 << 63) - 1

    def __call__(self, text: str) -> int:
        """Convert the word of a command line. Raises ArgumentTypeError if the word is not in the range."""
        # `int` would also accept digits of other scripts, underscores and white space.
        if not _WHOLE_NUMBER.fullmatch(text):
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
        if problem := self.problem(int(text)):
            raise argparse.ArgumentTypeError(problem)
        return int(text)

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a value, such as "must be at least 1, not 0"; None if it is in the range."""
        if value < self.least:
            return f"must be at least {self.least}, not {value}"
        if value > self.most:
            return f"must be at most {self.most}, not {value}"
        return None


@dataclass(frozen=True)
class Number:
    """The `type` of a command line argument that is a finite number in a range.

    Attributes:
        least: the smallest value; the bound of all values if `is_above`.
        most: the largest value.
        is_above: whether the values are larger than `least`.
    """

    least: float = -math.inf
    most: float = math.inf
    is_above: bool = False

    def __call__(self, text: str) -> float:
        """Convert the word of a command line. Raises ArgumentTypeError if the word is not in the range."""
        try:
            value = float(text) if text.isascii() and "_" not in text else None
        except ValueError:
            value = None
        if value is None:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
        if problem := self.problem(value):
            raise argparse.ArgumentTypeError(problem)
        return value

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a value, such as "must be above 0, not -1"; None if it is in the range."""
        if not math.isfinite(value):
            return f"must be a finite number, not {value}"
        if value < self.least or (self.is_above and value == self.least):
            return f"must be {'above' if self.is_above else 'at least'} {self.least:g}, not {value:g}"
        if value > self.most:
            return f"must be at most {self.most:g}, not {value:g}"
        return None


def split(text: str) -> str:
    """Return a value of Megatron's `--split` as it is. Raises ArgumentTypeError if it does not name three shares.

    Megatron itself reads the numbers of any text: 5 of "-5" and of "5e-1".
    """
    numbers = _SPLIT.fullmatch(text) and [float(number) for number in re.findall(r"[\d.]+", text)]
    if not numbers or not 0 < sum(numbers) < math.inf:
        raise argparse.ArgumentTypeError(f"must be three shares such as 99,1,0, not {text!r}")
    return text


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as `UserError`, in one line without the usage, and refuses abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise an error of the command line. Raises UserError."""
        message = message.removeprefix("argument ")
        for verb in ("must", "has", "is"):
            message = message.replace(f": {verb} ", f" {verb} ", 1)
        raise UserError(f"{message} (see {self.prog} --help)")


class Parser(OneLineParser):
    """A parser of all arguments of a command, which names unknown and repeated flags before it reports missing ones."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line, after checks for unknown flags, and for repeated flags that take several values."""
        words = list(sys.argv[1:] if args is None else args)
        takes_other_flags = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        if not takes_other_flags:
            refuse_unknown_flags(self, words)
            _refuse_repeated_lists(self, words)
        return super().parse_known_args(words, namespace)

    def option_names(self) -> frozenset[str]:
        """Return the names of all options, with their dashes."""
        return frozenset(self._option_string_actions)


def refuse_unknown_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse flags that a complete parser does not know. Words after `--` and a command line with `--help` may be any.

    Args:
        parser: has all arguments of the command.
        words: the command line.

    Raises:
        UserError: names all unknown flags and, for each, the most similar known flag.
    """
    known = parser._option_string_actions
    words = words[: [*words, "--"].index("--")]
    if not {"-h", "--help"}.isdisjoint(words):
        return
    # argparse takes a word with a space, such as a prompt that starts with dashes, for a value.
    flags = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--") and " " not in word)
    unknown = [flag for flag in flags if flag not in known]
    if unknown:
        hints = (difflib.get_close_matches(flag.replace("_", "-"), known, n=1) for flag in unknown)
        named = [f"{flag} (nearest: {hint[0]})" if hint else flag for flag, hint in zip(unknown, hints, strict=True)]
        raise UserError(f"unknown flag{'s' if len(named) > 1 else ''} {', '.join(named)}; --help lists all")


def _refuse_repeated_lists(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a flag with several values that is given twice, since argparse would silently drop its first values.

    Raises:
        UserError: names the flag.
    """
    given = [word.partition("=")[0] for word in words[: [*words, "--"].index("--")]]
    for action in parser._actions:
        if isinstance(action, argparse._StoreAction) and action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE):
            flags = [word for word in given if word in action.option_strings]
            if len(flags) > 1:
                raise UserError(f"{flags[-1]} is given {len(flags)} times: write all its values after one {flags[-1]}")


def add_force_argument(parser: argparse._ActionsContainer) -> None:
    """Add the flag that lets a command replace its earlier outputs, see `maskmoe.files.outputs.check_outputs`."""
    meaning = "replace output files that exist; inputs are never replaced"
    parser.add_argument("--force", action="store_true", help=meaning)
