"""The settings of conversions, as flags describe them, and of models, as `config.json` describes them.

Importing this module loads neither torch nor Megatron, so that a command line can print its help at once.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.json_files import check_finite, read_json
from maskmoe.routing_mask.feed_forward_layers import LAYER_FREQUENCY_ERROR, expand_layer_frequency, is_layer_frequency

DTYPE_NAMES = ("bf16", "fp16", "fp32")
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

DERIVED_PATTERN, NO_PATTERN = "auto", "none"
"""Values of `--hybrid-layer-pattern`: the pattern that follows from the model's layers, and none for a GPT model."""


@dataclass(frozen=True)
class Settings:
    """The settings that all conversions share.

    Attributes:
        load: The folder of the input: a transformers model, a `torch_dist` checkpoint, or the checkpoints of a run, of
            which the newest is converted.
        save: The folder of the result.
        dtype: One of `DTYPE_NAMES`, for all floating point tensors; None keeps the stored types.
        max_shard_size: Upper bound of a file's size in bytes, unless one tensor alone is larger. The tensors of one
            file are in memory at a time.
        allow_nan: Convert weights that are NaN or infinite, too.
        verify: Compare the input's files with the digests that were saved with them.
        tokenizer_type: Megatron's `--tokenizer-type`; None selects the tokenizer that the model was trained with.
        tokenizer_model: Megatron's `--tokenizer-model`; None selects the tokenizer that the model was trained with.
        hybrid_layer_pattern: The pattern of a `HybridModel` whose checkpoint is written, `DERIVED_PATTERN`, or
            `NO_PATTERN` for the checkpoint of a `GPTModel`; None selects the class of the model that `load` came from,
            and `DERIVED_PATTERN` if it did not come from Megatron. Ignored if no checkpoint is written.
        ckpt_step: Megatron's `--ckpt-step`: the iteration to convert of the checkpoints of a run; None for the newest.
    """

    load: Path
    save: Path
    dtype: str | None = None
    max_shard_size: int = 10**9
    allow_nan: bool = False
    verify: bool = True
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    hybrid_layer_pattern: str | None = None
    ckpt_step: int | None = None


@dataclass(frozen=True)
class UpcycleSettings:
    """How the experts of an upcycled model are made from a dense MLP.

    Attributes:
        num_experts: N, the number of experts in each MoE layer.
        topk: k, the number of experts of a token.
        granularity: g, the number of experts that the MLP is divided into. Expert e starts as part `e % g` of the MLP.
            N and k are multiples of g. Routers start with equal rows for the g parts of one copy, so that they are
            chosen together.
        moe_layer_freq: Megatron's `--moe-layer-freq`: every how many layers have experts, or a 0 or 1 for each layer.
        shared_expert: Give each MoE layer a shared expert, which starts as a copy of the whole MLP.
        seed: Seed of the routers.

    Raises:
        UserError: The settings contradict each other, or no layer gets experts.
    """

    num_experts: int
    topk: int = 2
    granularity: int = 1
    moe_layer_freq: int | list[int] = 1
    shared_expert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 2 or not 1 <= self.topk <= self.num_experts:
            raise UserError(f"cannot choose {self.topk} of {self.num_experts} experts")
        if self.granularity < 1 or self.num_experts % self.granularity or self.topk % self.granularity:
            raise UserError(
                f"--num-experts {self.num_experts} and --topk {self.topk} must be multiples of --granularity "
                f"{self.granularity}: that many experts make up one copy of the MLP and are chosen together"
            )
        if not is_layer_frequency(self.moe_layer_freq):
            raise UserError(LAYER_FREQUENCY_ERROR)

    def is_sparse(self, num_layers: int) -> list[bool]:
        """Return for each layer whether it gets experts.

        Raises:
            UserError: `moe_layer_freq` is for another number of layers.
        """
        is_sparse = expand_layer_frequency(self.moe_layer_freq, num_layers)
        if len(is_sparse) != num_layers:
            raise UserError(f"--moe-layer-freq is for {len(is_sparse)} layers, the model has {num_layers}")
        return is_sparse


def parse_size(text: str) -> int:
    """Return the number of bytes that a size such as 5GB, 300MiB or 1000 names, as in transformers' `max_shard_size`.

    Raises:
        ArgumentTypeError: The text is not a size, or the size is 0.
    """
    match = re.fullmatch(r"(\d+)(?:([KMGT])(I?)B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise ArgumentTypeError(f"{text!r} is not a size such as 5GB")
    return int(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]) if match[2] else 0)


_MOST_LAYERS, _MOST_EXPERTS, _MOST_IDS, _WIDEST = 10_000, 1 << 16, 1 << 24, 1 << 20

LARGEST = {
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
    """Read a `config.json`, check its numbers and sizes, and check that no other file replaces or adapts the weights.

    Raises:
        UserError: The file cannot be read, is not a JSON object, has an infinite number or a size beyond all models, or
            names other files of weights; or its folder holds adapters.
    """
    config = read_json(path)
    check_finite(config, path)
    if config.get("transformers_weights") is not None:  # may name an index, whose names transformers does not check
        raise UserError(
            f"{path} names its weights by transformers_weights: name them model.safetensors, and remove the key"
        )
    if path.with_name("adapter_config.json").exists():  # transformers applies adapters, if PEFT is installed
        raise UserError(
            f"{path.parent} holds adapters (adapter_config.json): merge them first with PEFT's merge_and_unload, or "
            "move them to another folder to use the model without them"
        )
    mask = config.get("routing_mask")
    for fields in (config, mask if isinstance(mask, Mapping) else {}):
        for name, largest in LARGEST.items():
            value = fields.get(name)
            if isinstance(value, int | float) and not value <= largest:  # refuses NaN, too
                raise UserError(f"{path}: {name} is {value:,}, more than the {largest:,} that MaskMoE accepts")
    return config


def ends_of_texts(folder: Path) -> int | list[int] | None:
    """Return the ids that end a text by the `generation_config.json` of a model, or None.

    Models for conversations often name further ends of a text in this file only.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / GENERATION_FILE
    ends = read_json(path).get("eos_token_id") if path.exists() else None
    return ends if end_ids(ends, path) else None


def end_ids(value: object, path: Path) -> list[int]:
    """Return the ids that end a text: `eos_token_id` of the `generation_config.json` in `path`, or none if it is None.

    Raises:
        UserError: The value is neither a token id nor a list of token ids.
    """
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{path}: eos_token_id is {value!r}, not token ids")
    return ends
