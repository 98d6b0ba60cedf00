"""Every number on a command line of MaskMoE has a declared range."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from maskmoe.arguments.parser import OneLineParser
from maskmoe.arguments.ranges import Number
from maskmoe.command_line.main import SUBCOMMANDS
from maskmoe.errors import UserError

TRAINING = ("pretrain", "evaluate")


class ParserFound(BaseException):
    """Carries a parser out of the function that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(name: str) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise ParserFound(parser)

    module = importlib.import_module(f"maskmoe.{SUBCOMMANDS[name][0]}")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [f"maskmoe {name}"]),
        mock.patch("signal.signal"),
        pytest.raises(ParserFound) as found,
    ):
        module.main()
    return found.value.parser


def with_subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


OWN = [name for name in SUBCOMMANDS if name not in TRAINING]


@pytest.mark.parametrize("name", OWN)
def test_parser_reports_in_one_line_and_each_number_has_a_range(name):
    numbers = 0
    for parser in with_subparsers(parser_of(name)):
        assert isinstance(parser, OneLineParser)
        assert not parser.allow_abbrev
        for action in parser._actions:
            assert action.type not in (int, float, complex), action.option_strings
            if isinstance(action.type, Number) and action.default not in (None, ()):
                numbers += 1
                defaults = action.default if isinstance(action.default, list | tuple) else [action.default]
                for default in defaults:
                    action.type(str(default))  # the default is in the range
    without_defaults = (
        "compare",
        "check",
        "preprocess",
        "count",
        "convert",
        "status",
    )
    assert numbers or name in without_defaults


@pytest.mark.parametrize("word", ["1", "7", "+3", "007"])
def test_whole_number(word):
    assert Number(1, 7)(word) == int(word)


@pytest.mark.parametrize("word", ["0", "8", "-1", "1.0", "", "0x1", "1e0", "one", "9" * 400, "9" * 9999])
def test_number_that_is_not_whole_or_not_in_the_range(word):
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        Number(1, 7)(word)


def test_finite_numbers():
    assert [Number(0, 1, float)(word) for word in ("0.5", "1", "1e-3", ".5", "0")] == [0.5, 1, 1e-3, 0.5, 0]
    for word in ("-1", "1.5", "", "nan", "inf", "-inf", "1e999", "half"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            Number(0, 1, float)(word)


def test_unknown_flag_is_named_with_the_nearest_one():
    parser = OneLineParser(prog="maskmoe", add_help=False)
    parser.add_argument("--learning-rate")
    with pytest.raises(UserError, match=r"^unknown flags --learning-rat \(nearest: --learning-rate\), --x; --help"):
        parser.parse_args(["--learning-rat", "1", "--x=2"])
