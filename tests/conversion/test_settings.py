"""Sizes in flags and in `config.json`; sizes beyond all models are refused."""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from maskmoe.conversion.settings import parse_size, read_model_config
from maskmoe.errors import UserError

CONFIG = {"model_type": "maskmoe", "num_hidden_layers": 2, "routing_mask": {"num_tables": 1}, "vocab_size": 8}


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "num_experts", "hidden_size"])
@pytest.mark.parametrize("value", [10**9, 1e300, float("inf"), float("nan")])
def test_sizes_beyond_all_models(tmp_path: Path, field: str, value: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    with pytest.raises(UserError, match=field):
        read_model_config(tmp_path / "config.json")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("300MiB", 300 << 20), ("12", 12), ("1kb", 1000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "1.5GB"])
def test_texts_that_are_not_sizes(text):
    with pytest.raises(ArgumentTypeError, match="is not a size"):
        parse_size(text)
