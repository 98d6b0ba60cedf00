"""Every number on a command line of MaskMoE has a declared range."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from maskmoe.arguments.parser import OneLineParser
from maskmoe.arguments.ranges import Number, WholeNumber, split
from maskmoe.command_line.main import SUBCOMMANDS

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
            if isinstance(action.type, WholeNumber | Number) and action.default not in (None, ()):
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


@pytest.mark.parametrize(
    ("word", "is_valid"),
    [("1", True), ("7", True), ("+3", True), ("007", True), ("0", False), ("8", False), ("-1", False), ("1.0", False)]
    + [(word, False) for word in ("", " 1", "1 ", "²", "٣", "1_0", "0x1", "1e0", "one", "9" * 9999)],
)
def test_whole_number(word, is_valid):
    if is_valid:
        assert WholeNumber(1, 7)(word) == int(word)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            WholeNumber(1, 7)(word)


@pytest.mark.parametrize(
    ("word", "is_valid"),
    [("0.5", True), ("1", True), ("1e-3", True), (".5", True), ("0", False), ("-1", False), ("1.5", False)]
    + [(word, False) for word in ("", "nan", "inf", "-inf", "1e999", "٠.٥", "1_0", "half")],
)
def test_number(word, is_valid):
    if is_valid:
        assert Number(0, 1, is_above=True)(word) == float(word)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            Number(0, 1, is_above=True)(word)


@pytest.mark.parametrize("word", ["99,1,0", "969, 30, 1", "95,5", "100", "0.9,0.05,0.05", "98/1/1", "[90,10,0]"])
def test_split(word):
    assert split(word) == word


@pytest.mark.parametrize("word", ["", "abc", "-1,2,3", "0,0,0", "1,2,3,4", "nan,1,1", "1e3,1,1", "1,,1", "1..2,3"])
def test_bad_split(word):
    with pytest.raises(argparse.ArgumentTypeError, match="must be three shares"):
        split(word)
