"""Translates hybrid models to the GPT models that compute the same, and back: Megatron's arguments and tensors' names.

The twin of a hybrid model has one transformer layer for each attention symbol and the `-` or `E` after the attention.
All other modules of conversion describe GPT models.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from maskmoe.conversion.opened_model import feed_forward_layers
from maskmoe.conversion.settings import DERIVED_PATTERN, NO_PATTERN
from maskmoe.errors import UserError
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

# Pairs of attention, plain or multi-latent, and a feed-forward layer, an MLP or experts.
_LAYERS_OF_GPT = re.compile(r"([*+][-E])+")
_FLAG = "--hybrid-layer-pattern"

# Sizes of an interleaved pipeline, which the two classes of models describe in different ways.
_PIPELINE_ARGS = ("num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size")

_DECODER_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_PREDICTION_LAYER = re.compile(r"(mtp\.layers\.\d+\.)transformer_layer\.")
_FINAL_NORM = "decoder.final_layernorm."
_FEED_FORWARD_MODULES = ("mlp.", "pre_mlp_layernorm.")


def is_hybrid(args: Namespace) -> bool:
    """Return whether Megatron's arguments, which may be a checkpoint's, describe a hybrid model."""
    return getattr(args, "hybrid_layer_pattern", None) is not None


def gpt_args(args: Namespace) -> Namespace:
    """Return Megatron's arguments of a hybrid model's GPT twin; for a GPT model, return its arguments.

    Raises:
        UserError: the hybrid model has no twin.
    """
    if not is_hybrid(args):
        return args
    pattern = args.hybrid_layer_pattern
    symbols = pattern.replace(Symbols.PIPE, "").rstrip(Symbols.MTP_SEPARATOR)
    decoder, *predictions = symbols.split(Symbols.MTP_SEPARATOR)
    if not _LAYERS_OF_GPT.fullmatch(decoder) or any(prediction != decoder[-2:] for prediction in predictions):
        raise UserError(
            f"a model with {_FLAG} '{pattern}' cannot be expressed in transformers' format: attention (* or +) and "
            "feed-forward layers (- or E) must alternate, and multi-token prediction must repeat the last two"
        )
    layers = FeedForwardLayers.of_pattern(pattern)
    return Namespace(
        **vars(args)
        | dict.fromkeys(_PIPELINE_ARGS)
        | {
            "hybrid_layer_pattern": None,
            "num_layers": len(layers.decoder),
            "mtp_num_layers": len(layers.prediction) or None,
            "num_experts": args.num_experts if layers.num_moe_layers else None,
            "moe_layer_freq": 1 if all(layers.decoder) else [int(has_experts) for has_experts in layers.decoder],
        }
    )


def with_pattern(args: Namespace, config: Mapping[str, Any], pattern: str | None) -> Namespace:
    """Return Megatron's arguments of the model of the chosen class that computes the same.

    Args:
        args: Megatron's arguments of a GPT model or of a hybrid model.
        config: the fields of the `MaskMoEConfig` of the same model.
        pattern: the pattern of a hybrid model, `DERIVED_PATTERN`, or `NO_PATTERN` for a GPT model; None keeps `args`.

    Raises:
        UserError: the pattern is one of another model.
    """
    if pattern is None or pattern == getattr(args, "hybrid_layer_pattern", None):
        return args
    args = gpt_args(args)
    if pattern == NO_PATTERN:
        return args
    layers = feed_forward_layers(config)
    derived = layers.pattern(Symbols.ATTENTION if config["kv_lora_rank"] is None else Symbols.MLA)
    decoder, slash, prediction = (derived if pattern == DERIVED_PATTERN else pattern).partition(Symbols.MTP_SEPARATOR)
    if decoder.replace(Symbols.PIPE, "") + slash + prediction != derived:
        raise UserError(
            f"{_FLAG} '{pattern}' does not fit the model, whose pattern is '{derived}'; only | may be added to it, "
            "between layers of the decoder"
        )
    hybrid = {"hybrid_layer_pattern": decoder + slash + prediction, "num_layers": 2 * len(layers.decoder)}
    return Namespace(**vars(args) | dict.fromkeys(_PIPELINE_ARGS) | hybrid | {"moe_layer_freq": 1})


def name_in_hybrid_model(name: str) -> str:
    """Return the name that a hybrid model's checkpoint gives to a tensor or an object of the model's GPT twin.

    Args:
        name: a name in a GPT model's checkpoint that has tensors for each layer.
    """
    if name.startswith(_FINAL_NORM):
        return f"decoder.final_norm.{name.removeprefix(_FINAL_NORM)}"
    if match := _DECODER_LAYER.match(name):
        module = name[match.end() :]
        return f"decoder.layers.{2 * int(match[1]) + _is_feed_forward(module)}.{module}"
    if match := _PREDICTION_LAYER.match(name):
        module = name[match.end() :]
        return f"{match[1]}mtp_model_layer.layers.{int(_is_feed_forward(module))}.{module}"
    return name


def _is_feed_forward(module: str) -> bool:
    """Return whether a module of a transformer layer belongs to the second symbol of the layer, `-` or `E`."""
    return module.startswith(_FEED_FORWARD_MODULES)
