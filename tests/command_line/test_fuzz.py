"""Random command lines: only exit codes 0 and 2 may come out, with one line on stderr for 2, and nothing is written."""

import argparse
import contextlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.command_lines import parse_training, run_command, writing_nothing

from maskmoe.command_line.main import SUBCOMMANDS
from maskmoe.errors import UserError

WORDS = st.one_of(
    st.sampled_from(["", "-", "--", "-1", "0", "1", "nan", "inf", "1e400", "²", "٣", ".", "..", "/", "nowhere/x", "~"]),
    st.sampled_from(["text.txt", "data", "mask.safetensors", "counts.safetensors", "model", "checkpoints", "n" * 5000]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)
NAMES = [subcommand.name for subcommand in SUBCOMMANDS if subcommand.name not in ("pretrain", "evaluate", "generate")]


class Accepted(BaseException):
    """A command line was accepted; its work is not part of these tests."""


@pytest.fixture
def stop_before_work() -> object:
    """Let commands end when their command line is parsed, before they read or write anything."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **options: object) -> None:
        parse_args(self, *args, **options)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        yield


@cache
def flags_of(name: str) -> list[str]:
    """Return the flags of a command, from its help."""
    words = run_command(*name.split(), "--help").output.split()
    return sorted({word.strip("[],()") for word in words if word.strip("[],()").startswith("--")})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("stop_before_work")
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_command_line(workshop: Path, name: str, data: st.DataObject) -> None:
    flag = st.sampled_from(flags_of(name))
    parts = st.one_of(
        st.tuples(flag, WORDS),
        st.tuples(WORDS),
        st.tuples(flag),
        st.builds("{}={}".format, flag, WORDS).map(lambda w: (w,)),
    )
    words = [word for part in data.draw(st.lists(parts, max_size=8)) for word in part]
    with writing_nothing(workshop):
        try:
            outcome = run_command(*name.split(), *words)
        except Accepted:
            return
    if outcome.code != 0:
        assert outcome.problem() is None


@settings(max_examples=200)
@given(data=st.data())
def test_random_flags_of_megatron(training_parser: argparse.ArgumentParser, data: st.DataObject) -> None:
    flag = st.sampled_from([flag for flag in training_parser._option_string_actions if flag not in ("-h", "--help")])
    patterns = st.text("[]()*+,0123456789", max_size=12)
    parts = st.one_of(st.tuples(flag, WORDS), st.tuples(flag), st.tuples(flag, patterns), st.tuples(WORDS))
    words = [word for part in data.draw(st.lists(parts, max_size=4)) for word in part]
    with contextlib.suppress(UserError):
        parse_training(training_parser, words)
