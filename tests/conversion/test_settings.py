"""Sizes in flags."""

from argparse import ArgumentTypeError

import pytest

from maskmoe.conversion.settings import parse_size


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("300MiB", 300 << 20), ("12", 12), ("1kb", 1000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "1.5GB"])
def test_texts_that_are_not_sizes(text):
    with pytest.raises(ArgumentTypeError, match="is not a size"):
        parse_size(text)
