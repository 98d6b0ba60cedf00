"""Random flags of Megatron: they are accepted, or refused as bad input."""

import argparse
import contextlib
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from maskmoe.errors import UserError


def parse_training(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line of training as a run and `--check` do first. Raises UserError."""
    from maskmoe.errors import megatrons_checks

    with megatrons_checks():
        return parser.parse_args(words)


WORDS = st.one_of(
    st.sampled_from(["", "-", "--", "-1", "0", "1", "nan", "inf", "1e400", "²", "٣", ".", "..", "/", "nowhere/x", "~"]),
    st.sampled_from(["text.txt", "data", "mask.safetensors", "counts.safetensors", "model", "checkpoints", "n" * 5000]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)


@given(data=st.data())
def test_random_flags_of_megatron(training_parser: argparse.ArgumentParser, data: st.DataObject) -> None:
    flags = training_parser._option_string_actions.keys() - {"-h", "--help", "--help-all"}
    flag = st.sampled_from(sorted(flags))
    patterns = st.text("[]()*+,0123456789", max_size=12)
    parts = st.one_of(st.tuples(flag, WORDS), st.tuples(flag), st.tuples(flag, patterns), st.tuples(WORDS))
    words = [word for part in data.draw(st.lists(parts, max_size=4)) for word in part]
    with contextlib.suppress(UserError):
        parse_training(training_parser, words)
