"""Tiny models of other families with random weights, and Megatron models built from a converted checkpoint."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing
from megatron.training.arguments import parse_args, validate_args
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from maskmoe.checkpoint.series import RELEASE, write_tracker
from maskmoe.conversion.convert import huggingface_to_megatron
from maskmoe.conversion.model_tensors import OpenedModel, mtp_tensor_shapes
from maskmoe.conversion.settings import Settings
from maskmoe.conversion.tensor_sources import Block
from maskmoe.huggingface import MaskMoEConfig, MaskMoEForCausalLM
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.model.model_builder import model_config_from_args
from maskmoe.training.resume.changed_settings import settings_of_checkpoint
from maskmoe.training.settings.arguments import add_maskmoe_arguments

VOCAB_SIZE = 67
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.8,
    "mscale_all_dim": 1.2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, rope_parameters=_LLAMA3),
    "llama, linear": lambda: LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama, tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=16, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES, rms_norm_eps=1e-3),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=6),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, **_EXPERTS, moe_intermediate_size=16, head_dim=16, norm_topk_prob=True, decoder_sparse_step=2
    ),
    "olmoe": lambda: OlmoeConfig(**_SIZES, **_EXPERTS),
    "deepseek_v3, dense": lambda: DeepseekV3Config(**_SIZES | _LATENT | {"first_k_dense_replace": 3}),
    "deepseek_v3": lambda: DeepseekV3Config(**_SIZES | _LATENT),
    "deepseek_v3, yarn": lambda: DeepseekV3Config(
        **_SIZES | _LATENT | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}, rope_parameters=_YARN
    ),
}
"""Functions that make a configuration: one for each known family, and for variants of a family."""


def make_model(name: str) -> PreTrainedModel:
    """Make a model in fp32 in which every parameter changes the output: no norm is 1, no bias 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter_name.endswith("norm.weight"):
                parameter.add_(1)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


def save_model(name: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """Make a model and save it to a folder; `settings` are passed to `save_pretrained`."""
    model = make_model(name)
    model.save_pretrained(folder, **settings)
    return model


def to_megatron(load: Path, save: Path, mask: RoutingMask | None = None, **settings: Any) -> list[str]:
    """Convert a model without a tokenizer into a checkpoint; return the flags that load the checkpoint."""
    return huggingface_to_megatron(Settings(load, save, tokenizer_type="NullTokenizer", **settings), mask)


def add_multi_token_prediction(folder: Path) -> dict[str, torch.Tensor]:
    """Add a layer of multi-token prediction to a saved DeepSeek-V3, as it was published; return the layer's tensors.

    The published files also hold copies of the embedding and of the output layer, which are not returned.
    """
    path, hidden, generator = folder / "model.safetensors", _SIZES["hidden_size"], torch.Generator().manual_seed(2)
    tensors = load_file(path)
    last, added = f"model.layers.{_SIZES['num_hidden_layers'] - 1}.", f"model.layers.{_SIZES['num_hidden_layers']}."
    shapes = {name.removeprefix(last): tensors[name].shape for name in tensors if name.startswith(last)}
    shapes |= dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (hidden,))
    shapes["eh_proj.weight"] = (hidden, 2 * hidden)
    layer = {added + name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    save_file(tensors | layer | {added + copy: tensors[name].clone() for copy, name in copies.items()}, path)
    return layer


def random_ids(length: int = 40) -> torch.Tensor:
    """Draw token ids, int64 [2, length]."""
    return torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits, float32 [batch, length, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def in_transformers(opened: OpenedModel) -> MaskMoEForCausalLM:
    """Load a model that conversion has opened into transformers, and check that no tensor is missing or left over.

    The layers of multi-token prediction are left out.
    """
    model = MaskMoEForCausalLM(MaskMoEConfig(**opened.config)).eval()
    specs, further = opened.source.tensors, mtp_tensor_shapes(opened.config)
    tensors = {name: opened.source.read(Block.whole(name, specs[name].shape)) for name in specs if name not in further}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if opened.config["tie_word_embeddings"] else [])
    model.tie_weights()
    return model


TRAINING = "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3"
"""Flags without which Megatron accepts no others."""

ON_ONE_RANK = Namespace(pipeline_model_parallel_size=1)
"""Megatron's arguments that decide where a checkpoint's pattern is divided."""


def load_converted_model(load: Path, flags: list[str]) -> tuple[torch.nn.Module, Namespace]:
    """Load a model with the flags of a user; return the model and Megatron's arguments.

    Args:
        load: Folder of the checkpoint `release`.
        flags: The flags that the conversion returned, and further flags of Megatron.
    """
    words = f"pretrain --load {load} --use-checkpoint-args {' '.join(flags)} {TRAINING} --data-path none".split()

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = add_maskmoe_arguments(parser)
        parser.set_defaults(**settings_of_checkpoint(ON_ONE_RANK, load / "release"))
        return parser

    with mock.patch.object(sys, "argv", words):
        args, _ = checkpointing.load_args_from_checkpoint(parse_args(add_arguments))
        args = validate_args(args)
    model = build_model(args)
    state, *_ = checkpointing._load_base_checkpoint(
        str(load), args, sharded_state_dict={"model": model.sharded_state_dict()}
    )
    model.load_state_dict(state["model"])
    return model.eval(), args


def build_model(args: Namespace) -> torch.nn.Module:
    """Build the model of a run with these arguments of Megatron."""
    config = model_config_from_args(args)
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def save_as_release(model: torch.nn.Module, args: Namespace, folder: Path) -> None:
    """Save a model as the checkpoint `release` in a folder, which `load_converted_model` loads."""
    (folder / RELEASE).mkdir(parents=True)
    state = {"args": args, "iteration": 0, "model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(folder / RELEASE))
    write_tracker(folder, RELEASE)


def logits_of_megatron(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits, float32 [batch, length, padded vocabulary], of ids, int64 [batch, length]."""
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
