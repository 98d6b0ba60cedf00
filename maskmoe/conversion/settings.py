"""The settings of conversions, as flags describe them, and the files that describe a transformers model.

Importing this module loads neither torch nor Megatron, so that a command line can print its help at once.
"""

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json

DTYPE_NAMES = ("bf16", "fp16", "fp32")
CONFIG_FILE = "config.json"


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
        verify: Compare the input's files with the digests that were saved with them.
        tokenizer_type: Megatron's `--tokenizer-type`; None selects the tokenizer that the model was trained with.
        tokenizer_model: Megatron's `--tokenizer-model`; None selects the tokenizer that the model was trained with.
        ckpt_step: Megatron's `--ckpt-step`: the iteration to convert of the checkpoints of a run; None for the newest.
    """

    load: Path
    save: Path
    dtype: str | None = None
    max_shard_size: int = 10**9
    verify: bool = True
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    ckpt_step: int | None = None


@dataclass(frozen=True)
class UpcycleSettings:
    """How the experts of an upcycled model are made from a dense MLP.

    Attributes:
        num_experts: N, the number of experts in each MoE layer.
        topk: k, the number of experts of a token.
        granularity: g, the number of experts that the MLP is divided into. Expert e starts as part `e % g` of the MLP.
            N and k are multiples of g.
        moe_layer_freq: Megatron's `--moe-layer-freq`: every how many layers have experts, or a 0 or 1 for each layer.
        shared_expert: Give each MoE layer a shared expert, which starts as a copy of the whole MLP.
        seed: Seed of the routers.

    Raises:
        UserError: N or k is no multiple of g.
    """

    num_experts: int
    topk: int = 2
    granularity: int = 1
    moe_layer_freq: int | list[int] = 1
    shared_expert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts % self.granularity or self.topk % self.granularity:
            raise UserError(
                f"--num-experts {self.num_experts} and --topk {self.topk} must be multiples of --granularity "
                f"{self.granularity}: that many experts make up one copy of the MLP and are chosen together"
            )


def parse_size(text: str) -> int:
    """Return the number of bytes that a size such as 5GB, 300MiB or 1000 names, as in transformers' `max_shard_size`.

    Raises:
        ArgumentTypeError: The text is not a size, or the size is 0.
    """
    match = re.fullmatch(r"(\d+)(?:([KMGT])(I?)B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise ArgumentTypeError(f"{text!r} is not a size such as 5GB")
    return int(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]) if match[2] else 0)


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`, and check that no adapters beside it would change the weights.

    Raises:
        UserError: The file cannot be read or is not a JSON object, or its folder holds adapters.
    """
    config = read_json(path)
    if path.with_name("adapter_config.json").exists():  # transformers applies adapters, if PEFT is installed
        raise UserError(
            f"{path.parent} holds adapters (adapter_config.json): merge them first with PEFT's merge_and_unload, or "
            "move them to another folder to use the model without them"
        )
    return config
