"""The parser of all command lines, which reports errors in one line, and the arguments that several commands share."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from maskmoe.arguments import ranges
from maskmoe.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises its errors as `UserError`, in one line without the usage, and refuses abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise an error of the command line. Raises UserError."""
        message = message.removeprefix("argument ")
        for verb in ("must", "has", "is"):
            message = message.replace(f": {verb} ", f" {verb} ", 1)
        raise UserError(f"{message} (see {self.prog} {_help_flag(self)})")


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


def _help_flag(parser: argparse.ArgumentParser) -> str:
    """Return the flag that shows all arguments; with Megatron's arguments, `--help` shows only MaskMoE's."""
    return "--help-all" if "--help-all" in parser._option_string_actions else "--help"


def refuse_unknown_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse flags that a complete parser does not know. Words after `--` and a command line with `--help` may be any.

    Args:
        parser: Has all arguments of the command.
        words: The command line.

    Raises:
        UserError: Names all unknown flags and, for each, the most similar known flag.
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
        raise UserError(
            f"unknown flag{'s' if len(named) > 1 else ''} {', '.join(named)}; {_help_flag(parser)} lists all"
        )


def _refuse_repeated_lists(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a flag with several values that is given twice, since argparse would silently drop its first values.

    Raises:
        UserError: Names the flag.
    """
    given = [word.partition("=")[0] for word in words[: [*words, "--"].index("--")]]
    for action in parser._actions:
        if isinstance(action, argparse._StoreAction) and action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE):
            flags = [word for word in given if word in action.option_strings]
            if len(flags) > 1:
                raise UserError(f"{flags[-1]} is given {len(flags)} times: write all its values after one {flags[-1]}")


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


def add_force_argument(parser: argparse._ActionsContainer) -> None:
    """Add the flag that lets a command replace its earlier outputs, see `maskmoe.files.outputs.check_outputs`."""
    meaning = "replace output files that exist; inputs are never replaced"
    parser.add_argument("--force", action="store_true", help=meaning)


def command_parser(documentation: str | None) -> Parser:
    """Return a parser whose help is the docstring of a command's module.

    The docstring's part from its examples on is shown after the arguments; `%(prog)s` stands for the program.
    """
    description, _, examples = (documentation or "").partition("\nExample")
    return Parser(
        description=description, epilog=f"example{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the number of processes."""
    meaning = "number of processes; does not change the result (default: number of available cores)"
    add_option(parser, "--workers W", meaning, ranges.PROCESSES)


def add_seed_argument(parser: argparse._ActionsContainer, purpose: str, default: int = 0) -> None:
    """Add the flag for the seed of something random."""
    add_option(parser, "--seed S", f"seed of {purpose}", ranges.SEED, default=default)


def say_loading(phase: str) -> None:
    """Print what a command does, such as "reading the model", to stderr before it can show a progress bar."""
    print(f"loading: {phase}", file=sys.stderr, flush=True)
