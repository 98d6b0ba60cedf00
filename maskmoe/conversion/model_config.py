"""Reads the `config.json` of a model, which a stranger may have written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.json_files import check_finite, read_json

_MOST_LAYERS, _MOST_EXPERTS, _MOST_IDS, _WIDEST = 10_000, 1 << 16, 1 << 24, 1 << 20

_LARGEST = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_nextn_predict_layers", "num_tables", "first_k_dense_replace"), _MOST_LAYERS
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), _MOST_EXPERTS),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), _MOST_EXPERTS),
    **dict.fromkeys(("vocab_size", "num_rows", "metadata_bytes"), _MOST_IDS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), _WIDEST),
    **dict.fromkeys(("shared_expert_intermediate_size", "num_attention_heads", "num_key_value_heads"), _WIDEST),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank"), _WIDEST),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _WIDEST),
}
"""The largest value of each size. The bounds are far above all models; they keep a wrong number from using memory."""


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a `config.json` and check that its numbers are finite and its sizes are plausible.

    Raises:
        UserError: the file cannot be read, is not a JSON object, or has an infinite number or a size beyond all models.
    """
    config = read_json(path)
    check_finite(config, path)
    check_sizes(config, path)
    return config


def check_sizes(config: Mapping[str, Any], where: object) -> None:
    """Check that no size of a model's configuration is beyond all models.

    Args:
        config: the fields of `config.json`.
        where: what holds the fields, for error messages.

    Raises:
        UserError: names the size.
    """
    mask = config.get("routing_mask")
    for fields in (config, mask if isinstance(mask, Mapping) else {}):
        for name, largest in _LARGEST.items():
            value = fields.get(name)
            if isinstance(value, int | float) and not value <= largest:  # refuses NaN, too
                raise UserError(f"{where}: {name} is {value:,}, more than the {largest:,} that MaskMoE accepts")
