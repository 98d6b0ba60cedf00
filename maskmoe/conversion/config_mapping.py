"""Translates Megatron's arguments into the configuration of a transformers model, and back.

A hybrid model is described by its twin: the GPT model that computes the same. The twin has one transformer layer for
each attention symbol and the `-` or `E` after the attention.
"""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import cache
from math import isclose, log
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from maskmoe.checkpoint.saved_names import has_alike_layers
from maskmoe.conversion.model_tensors import feed_forward_layers
from maskmoe.conversion.tokenizer import WITHOUT_TEXT
from maskmoe.errors import UserError
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

# Arguments of Megatron that have only this value in a model that transformers can express.
_FIXED_ARGS: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "layernorm_zero_centered_gamma": False,
    "linear_attention_freq": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_router_force_biased": None,
    "moe_router_force_load_balancing": False,
    "moe_shared_expert_glu_interleave_size": None,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "quick_geglu": False,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "squared_relu": False,
    "swiglu": True,
    "use_mup": False,
    "window_size": None,
}
# Megatron's `--use-rope-scaling` has these values of Llama 3.1 built in; only the factor is free.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Settings of YaRN in multi-latent attention for which Megatron has no flags, with Megatron's values.
_YARN_WITHOUT_FLAGS = {
    name: getattr(MLATransformerConfig, name) for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")
}
# Fields of `MaskMoEConfig` with the argument of Megatron that has the same value.
_FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "mtp_use_repeated_layer": "mtp_use_repeated_layer",
}
_LATENT_FIELDS = {
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
_EXPERT_FIELDS = {
    "num_experts_per_tok": "moe_router_topk",
    "scoring_func": "moe_router_score_function",
    "use_expert_bias": "moe_router_enable_expert_bias",
    "topk_group": "moe_router_group_topk",
    "shared_expert_gate": "moe_shared_expert_gate",
    "aux_loss_tokens": "moe_aux_loss_tokens",
}
# Arguments that the configuration does not describe, with the field from which `args_from_config` makes them.
_FREE_ARGS = {
    "seq_length": "max_position_embeddings",
    "moe_router_load_balancing_type": "router_aux_loss_coef",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
}
_VOCABULARY_ARGS = ("padded_vocab_size", "make_vocab_size_divisible_by")
_VOCAB_DIVISOR = 128
"""Megatron's default of `--make-vocab-size-divisible-by`."""


def config_from_args(args: Namespace, vocab_size: int) -> dict[str, Any]:
    """Return the fields of `MaskMoEConfig`, except `routing_mask`, for the model that Megatron's arguments describe.

    Args:
        args: Megatron's arguments as a checkpoint holds them.
        vocab_size: Number of the tokenizer's ids, without padding.

    Raises:
        UserError: The model has settings that the transformers model does not have; names all of them. Or it is a
            hybrid model with layers that the transformers model does not have; names the first of them.
    """
    args = gpt_args(Namespace(**_default_args() | vars(args)))
    if refusals := _inexpressible(args):
        raise UserError(f"a model with {', '.join(refusals)} cannot be expressed in transformers' format")
    fields = {field: getattr(args, name) for field, name in _FIELDS.items()} | {
        **(_latent_attention_fields(args) if args.multi_latent_attention else _attention_fields(args)),
        "vocab_size": vocab_size,
        "num_nextn_predict_layers": args.mtp_num_layers or 0,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in FeedForwardLayers.of_args(args).decoder],
        "num_experts": args.num_experts or 0,
    }
    if not args.num_experts:
        return fields
    return fields | {
        **{field: getattr(args, name) for field, name in _EXPERT_FIELDS.items()},
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "norm_topk_prob": args.moe_router_score_function != "softmax" or not args.moe_router_pre_softmax,
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "n_group": args.moe_router_num_groups if args.moe_router_group_topk else None,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or 0,
        "router_aux_loss_coef": _aux_loss_coefficient(args),
    }


def args_from_config(config: Mapping[str, Any]) -> Namespace:
    """Return Megatron's arguments that describe a model as a `GPTModel`; arguments of training are left to the run.

    Args:
        config: The fields of `MaskMoEConfig`.

    Raises:
        UserError: The model has a setting, or a combination of scores and normalisation, that Megatron-Core does not
            have; names the setting.
    """
    if config["hidden_act"] not in ("silu", "swish"):
        raise UserError(f"hidden_act is {config['hidden_act']!r}, but only models with 'silu' can be converted")
    if config.get("is_causal") is False:
        raise UserError("is_causal is false, but only causal models can be converted")
    is_sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
    args = _FIXED_ARGS | {name: config[field] for field, name in _FIELDS.items()}
    args |= _latent_attention_args(config) if config["kv_lora_rank"] is not None else _attention_args(config)
    args |= {
        "seq_length": config["max_position_embeddings"],
        "mtp_num_layers": config["num_nextn_predict_layers"] or None,
        "qk_layernorm": config["qk_norm"] is not None,
        "qk_layernorm_all_heads": config["qk_norm"] == "all_heads",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "hidden_dropout": 0.0,
        "add_position_embedding": True,
        "make_vocab_size_divisible_by": _VOCAB_DIVISOR,
        "padded_vocab_size": -(-config["vocab_size"] // _VOCAB_DIVISOR) * _VOCAB_DIVISOR,
        "num_experts": config["num_experts"] if any(is_sparse) else None,
    }
    if not any(is_sparse):
        return Namespace(**args)
    topk, scores, normalised = config["num_experts_per_tok"], config["scoring_func"], config["norm_topk_prob"]
    if scores == "softmax" and normalised and topk == 1:
        raise UserError("Megatron-Core has no norm_topk_prob with num_experts_per_tok 1: all weights would be 1")
    if scores != "softmax" and not normalised and topk > 1:
        raise UserError(f"Megatron-Core has scoring_func {scores} only with norm_topk_prob")
    scaling_factor = config["routed_scaling_factor"]
    args |= {name: config[field] for field, name in _EXPERT_FIELDS.items()} | {
        # Megatron stores each layer apart if it is given a pattern, so give none if all layers are alike.
        "moe_layer_freq": 1 if all(is_sparse) else [int(sparse) for sparse in is_sparse],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": scores == "softmax" and not normalised,
        "moe_router_topk_scaling_factor": None if scaling_factor == 1.0 else scaling_factor,
        "moe_router_num_groups": config["n_group"],
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"] or None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": config["router_aux_loss_coef"],
    }
    return Namespace(**args)


def updated_args(args: Namespace, config: Mapping[str, Any]) -> Namespace:
    """Return the arguments that a model was trained with, with new values for what its configuration changes.

    Args:
        args: Megatron's arguments of a GPT model or of a hybrid model.
        config: The fields of the model's `MaskMoEConfig`, which may have changed since training.

    Returns:
        `args` if nothing has changed, else the arguments of a GPT model.

    Raises:
        UserError: The model cannot be expressed in Megatron.
    """
    trained = config_from_args(args, config["vocab_size"])
    has_rows = config["vocab_size"] <= args.padded_vocab_size  # else the embedding was resized
    if has_rows and all(config.get(name) == value for name, value in trained.items()):
        return args
    own, made = vars(gpt_args(args)), vars(args_from_config(config))
    kept = [name for name, field in _FREE_ARGS.items() if trained.get(field) == config.get(field)]
    kept += ["hidden_dropout", *(_VOCABULARY_ARGS if has_rows else ())]
    # `made` lacks the arguments without flags if they have Megatron's values.
    others = {name: value for name, value in own.items() if name not in _YARN_WITHOUT_FLAGS}
    return Namespace(**others | made | {name: own[name] for name in kept if name in own})


def is_stacked(args: Namespace) -> bool:
    """Return whether Megatron saves one tensor for all layers of this model, as opposed to one for each layer."""
    return has_alike_layers(args) and not is_hybrid(args)


def further_flags(args: Namespace) -> list[str]:
    """Return the flags that a run from this checkpoint needs in addition to `--use-checkpoint-args`."""
    loss_tokens = getattr(args, "moe_aux_loss_tokens", "all")
    flags = [f"--{name}" for name in ("bf16", "fp16") if getattr(args, name, False)]
    flags += [f"--vocab-size {args.vocab_size}"] if args.tokenizer_type == WITHOUT_TEXT else []
    return flags + ([f"--moe-aux-loss-tokens {loss_tokens}"] if loss_tokens != "all" else [])


def _aux_loss_coefficient(args: Namespace) -> float:
    """Return the coefficient of the loss `aux_loss`, the only load-balancing loss that the transformers model has."""
    kinds, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    return dict(zip(kinds, coefficients, strict=True)).get("aux_loss", 0.0)


def _attention_fields(args: Namespace) -> dict[str, Any]:
    """Return the fields of `MaskMoEConfig` about grouped-query attention."""
    return dict.fromkeys(_LATENT_FIELDS) | {
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "attention_bias": args.add_qkv_bias,
        "rope_parameters": _rope_parameters(args),
        "qk_norm": ("all_heads" if args.qk_layernorm_all_heads else "head") if args.qk_layernorm else None,
    }


def _attention_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments about grouped-query attention."""
    return _rotary_args(config["rope_parameters"]) | {
        "multi_latent_attention": False,
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "add_qkv_bias": config["attention_bias"],
    }


def _latent_attention_fields(args: Namespace) -> dict[str, Any]:
    """Return the fields of `MaskMoEConfig` about multi-latent attention, whose projections never have biases."""
    return {field: getattr(args, name) for field, name in _LATENT_FIELDS.items()} | {
        "num_key_value_heads": args.num_attention_heads,
        "head_dim": args.qk_pos_emb_head_dim,
        "attention_bias": False,
        "rope_parameters": _latent_rope_parameters(args),
        "qk_norm": "latent" if args.qk_layernorm else None,
    }


def _latent_attention_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments about multi-latent attention."""
    rope = config["rope_parameters"]
    args = _yarn_args(rope) if rope["rope_type"] == "yarn" else {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    args |= {name: config[field] for field, name in _LATENT_FIELDS.items()} | {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "kv_channels": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "add_qkv_bias": False,
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
    }
    if rope["rope_type"] not in ("default", "yarn"):
        raise UserError(f"Megatron-Core's multi-latent attention has no rope_type {rope['rope_type']}")
    return args


def _latent_rope_parameters(args: Namespace) -> dict[str, Any]:
    """Return the field `rope_parameters` of `MaskMoEConfig` for multi-latent attention, which uses YaRN by default."""
    rope_theta = float(args.rotary_base)
    if args.rope_type == "rope":
        return {"rope_type": "default", "rope_theta": rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": rope_theta,
        "factor": args.rotary_scaling_factor,
        **{name: getattr(args, name) for name in _YARN_WITHOUT_FLAGS},
        "mscale": args.mscale,
        "mscale_all_dim": args.mscale_all_dim,
        # transformers derives another factor if `mscale_all_dim` is 0.
        "attention_factor": _yarn_attention_factor(args.rotary_scaling_factor, args.mscale, args.mscale_all_dim),
    }


def _yarn_args(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments about YaRN in multi-latent attention.

    Raises:
        UserError: Megatron-Core does not have the model's rotary embedding.
    """
    factor, mscale_all_dim = rope["factor"], rope.get("mscale_all_dim") or 0.0
    # Without `attention_factor`, transformers uses `mscale` only along with `mscale_all_dim`.
    mscale = (rope.get("mscale") or 1.0) if mscale_all_dim or rope.get("attention_factor") else 1.0
    attention_factor = _yarn_attention_factor(factor, mscale, mscale_all_dim)
    expected = rope.get("attention_factor")
    if expected is None:
        expected = attention_factor if rope.get("mscale") or not mscale_all_dim else _yarn_mscale(factor, 1.0)
    if not isclose(attention_factor, expected) or not rope.get("truncate", True):
        raise UserError(
            "Megatron-Core supports YaRN only with truncate, and with the attention_factor that follows from factor, "
            f"mscale and mscale_all_dim; rope_parameters are {dict(rope)}"
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        **{name: rope[name] for name, value in _YARN_WITHOUT_FLAGS.items() if (rope.get(name) or value) != value},
    }


def _yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Return the factor of rotary cosines and sines in YaRN."""
    return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _rope_parameters(args: Namespace) -> dict[str, Any]:
    """Return the field `rope_parameters` of `MaskMoEConfig`."""
    parameters: dict[str, Any] = {"rope_type": "default"}
    if args.use_rope_scaling:
        parameters = _LLAMA3_ROPE | {"factor": args.rope_scaling_factor}
    elif args.rotary_seq_len_interpolation_factor is not None:
        parameters = {"rope_type": "linear", "factor": float(args.rotary_seq_len_interpolation_factor)}
    parameters["rope_theta"] = float(args.rotary_base)
    if args.rotary_percent != 1.0:
        parameters["partial_rotary_factor"] = args.rotary_percent
    return parameters


def _rotary_args(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments about the rotary embedding.

    Raises:
        UserError: Megatron-Core does not have the model's rotary embedding.
    """
    factor = rope.get("factor", 1.0)
    is_llama3, is_linear = rope["rope_type"] == "llama3", rope["rope_type"] == "linear"
    args = {
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_seq_len_interpolation_factor": int(factor) if is_linear else None,
        "use_rope_scaling": is_llama3,
        "rope_scaling_factor": factor if is_llama3 else _default_args()["rope_scaling_factor"],
    }
    if not _rope_parameters(Namespace(**args)).items() <= rope.items():
        raise UserError(
            "Megatron-Core supports rotary embeddings without scaling, with rope_type linear and a whole factor, and "
            f"with {_LLAMA3_ROPE} and any factor; rope_parameters are {dict(rope)}"
        )
    return args


def _inexpressible(args: Namespace) -> list[str]:
    """Return the arguments whose values the transformers model does not have."""
    refusals = []
    for name, fixed in _FIXED_ARGS.items():
        value = getattr(args, name)
        if value != fixed and (value or fixed):  # 0, False and None all switch a feature off
            refusals.append(f"{name} {value}")
    if args.use_rope_scaling and args.rotary_seq_len_interpolation_factor is not None:
        refusals.append("--rotary-seq-len-interpolation-factor along with --use-rope-scaling")
    if args.multi_latent_attention and args.rotary_percent != 1.0:
        refusals.append(f"--rotary-percent {args.rotary_percent} along with --multi-latent-attention")
    for balancing in ("sinkhorn", "quantile_balancing"):  # which choose and weigh experts in ways of their own
        if balancing in args.moe_router_load_balancing_type:  # a type, or a list of types
            refusals.append(f"--moe-router-load-balancing-type {balancing}")
    is_scaled = args.rotary_scaling_factor > 1.0 and args.mscale_all_dim
    if args.multi_latent_attention and args.rope_type == "rope" and is_scaled:
        refusals.append("--rotary-scaling-factor and --mscale-all-dim along with --rope-type rope")
    return refusals


@cache
def _default_args() -> dict[str, Any]:
    """Return the defaults of all arguments; checkpoints of older versions, or without experts, may lack some."""
    defaults = vars(add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args([]))
    return defaults | _YARN_WITHOUT_FLAGS | {"moe_aux_loss_tokens": "all", "qk_layernorm_all_heads": False}


# Pairs of attention, plain or multi-latent, and a feed-forward layer, an MLP or experts.
_LAYERS_OF_GPT = re.compile(r"([*+][-E])+")
# Sizes of an interleaved pipeline, which the two classes of models describe in different ways.
_PIPELINE_ARGS = ("num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size")


def is_hybrid(args: Namespace) -> bool:
    """Return whether Megatron's arguments, which may be a checkpoint's, describe a hybrid model."""
    return getattr(args, "hybrid_layer_pattern", None) is not None


def gpt_args(args: Namespace) -> Namespace:
    """Return Megatron's arguments of a hybrid model's GPT twin; for a GPT model, return its arguments.

    Raises:
        UserError: The hybrid model has no twin.
    """
    if not is_hybrid(args):
        return args
    pattern = args.hybrid_layer_pattern
    symbols = pattern.replace(Symbols.PIPE, "").rstrip(Symbols.MTP_SEPARATOR)
    decoder, *predictions = symbols.split(Symbols.MTP_SEPARATOR)
    if not _LAYERS_OF_GPT.fullmatch(decoder) or any(prediction != decoder[-2:] for prediction in predictions):
        raise UserError(
            f"a model with --hybrid-layer-pattern '{pattern}' cannot be expressed in transformers' format: attention "
            "(* or +) and feed-forward layers (- or E) must alternate, and multi-token prediction must repeat the last "
            "two"
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


def hybrid_args(args: Namespace, config: Mapping[str, Any]) -> Namespace:
    """Return Megatron's arguments of the hybrid model that computes the same as a GPT model.

    Args:
        args: Megatron's arguments of the GPT model.
        config: The fields of the `MaskMoEConfig` of the same model.
    """
    layers = feed_forward_layers(config)
    pattern = layers.pattern(Symbols.ATTENTION if config["kv_lora_rank"] is None else Symbols.MLA)
    hybrid = {"hybrid_layer_pattern": pattern, "num_layers": 2 * len(layers.decoder), "moe_layer_freq": 1}
    return Namespace(**vars(args) | dict.fromkeys(_PIPELINE_ARGS) | hybrid)
