"""The configuration of a model is read from `config.json`; sizes beyond all models are refused."""

import json
from pathlib import Path

import pytest

from maskmoe.conversion.model_config import read_model_config
from maskmoe.errors import UserError

CONFIG = {"model_type": "maskmoe", "num_hidden_layers": 2, "routing_mask": {"num_tables": 1}, "vocab_size": 8}


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "num_experts", "hidden_size"])
@pytest.mark.parametrize("value", [10**9, 1e300, float("inf"), float("nan")])
def test_sizes_beyond_all_models(tmp_path: Path, field: str, value: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    with pytest.raises(UserError, match=field):
        read_model_config(tmp_path / "config.json")
