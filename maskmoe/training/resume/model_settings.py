"""Settings of a checkpoint's model: a run takes them over, or compares them with its own."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, get_hybrid_total_pipeline_segment_count
from megatron.training.checkpointing import load_args_from_checkpoint

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.saved_names import saved_pattern, without_new_layers
from maskmoe.checkpoint.series import temporary_load_folder
from maskmoe.errors import UserError
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.transformer.torch_modules import gated_delta_net

# Settings of YaRN for which Megatron has no flags; its configuration of multi-latent attention takes them from the
# arguments. Converted checkpoints have them if they differ from Megatron's values.
_YARN_WITHOUT_FLAGS = ("original_max_position_embeddings", "beta_fast", "beta_slow")
# Arguments that decide the kinds and the number of layers, if there is no pattern.
_LAYER_ARGUMENTS = ("num_layers", "mtp_num_layers", "moe_layer_freq")
# Other arguments that decide the shapes of a model's parameters, or what layers compute from them.
_MODEL_ARGUMENTS = (
    *("quick_geglu", "glu_linear_offset", "activation_func_clamp_value", "moe_apply_probs_on_input"),
    *("attention_output_gate", "softmax_type", "qk_l2_norm", "squared_relu", "rotary_interleaved"),
    *("layernorm_zero_centered_gamma", "use_mup", "mtp_use_repeated_layer"),
    *("hidden_size", "ffn_hidden_size", "swiglu", "add_bias_linear"),
    *("num_attention_heads", "group_query_attention", "num_query_groups", "kv_channels", "multi_latent_attention"),
    *("add_qkv_bias", "qk_layernorm", "qk_layernorm_all_heads", "normalization", "layernorm_epsilon"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_enable_expert_bias", "moe_latent_size"),
    *("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    *("position_embedding_type", "max_position_embeddings", "untie_embeddings_and_output_weights"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
)
# Arguments that change what a model computes, and that a run may change on purpose, for example for longer sequences.
ADJUSTABLE_ARGUMENTS = (
    *("moe_router_num_groups", "moe_router_group_topk"),
    *("moe_expert_capacity_factor", "moe_token_drop_policy", "moe_pad_expert_input_to_capacity"),
    *("window_size", "window_attn_skip_freq", "no_rope_freq"),
    *("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
    *("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
    *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    "yarn_correction_range_round_to_int",
    *("mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult"),
    *("mup_base_head_dim", "mup_attn_scale_power"),
)
# Arguments that choose layers by their numbers, of which a layer of a GPT model has one and its pattern has two.
_COUNTING_ARGUMENTS = ("window_attn_skip_freq", "no_rope_freq")
# Flags that do not have the names of their arguments.
_FLAGS = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "use_layer_wise_distributed_optimizer": "--use-distributed-optimizer",  # with Muon and Lion
}
# Formats in which the distributed optimizer saves its state in the order of a model's parameters, without their names.
_NAMELESS_OPTIMIZER_FORMATS = ("dp_reshardable", "dp_zero_gather_scatter")


def take_settings_of_checkpoint(args: Namespace, checkpoint: Path, given: Collection[str] = ()) -> Namespace:
    """Return the arguments, completed by the settings of a checkpoint as Megatron does for `--use-checkpoint-args`.

    Megatron alone would replace many settings of the command line by the checkpoint's. `given` names the arguments that
    the command line gives; they keep their values. Exception: with a layer pattern, `num_layers` and `moe_layer_freq`
    are reset, because the pattern decides them.
    """
    given_values = {name: value for name, value in vars(args).items() if name in given}
    with temporary_load_folder(checkpoint, args):
        args, _ = load_args_from_checkpoint(args)
    tokenizer_type = given_values.get("tokenizer_type", args.tokenizer_type)
    if tokenizer_type != args.tokenizer_type or tokenizer_type == "NullTokenizer":  # which needs no model
        args.tokenizer_model = None
    vars(args).update(given_values)
    if args.hybrid_layer_pattern is not None:  # which decides the layers; the checkpoint may be a GPT model's
        args.num_layers, args.moe_layer_freq = None, 1
    return args


def further_checkpoint_args(args: Namespace, checkpoint: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's model, many of which Megatron's `--use-checkpoint-args` leaves out.

    Megatron takes the pattern of a hybrid model as it is, with the bounds of the pipeline stages of the run that saved
    the checkpoint. They are left out if they do not fit the layout of this run.
    """
    saved = read_common_state(checkpoint).get("args", Namespace())
    names = (*_MODEL_ARGUMENTS, *ADJUSTABLE_ARGUMENTS, *gated_delta_net.SIZES, *_YARN_WITHOUT_FLAGS)
    chosen = {name: getattr(saved, name) for name in names if hasattr(saved, name)}
    pattern = saved_pattern(saved)
    if pattern is not None:
        stages, num_chunks = args.pipeline_model_parallel_size, get_hybrid_total_pipeline_segment_count(pattern)
        # Interleaved pipelines are for training only.
        fits = num_chunks == stages or (stages > 1 and num_chunks % stages == 0 and not args.skip_train)
        chosen["hybrid_layer_pattern"] = pattern if fits else pattern.replace(Symbols.PIPE, "")
    return chosen


def take_padding_of_checkpoint(args: Namespace, checkpoint: Path, vocab_size: int) -> None:
    """Set the padded vocabulary size to a checkpoint's, if it has `vocab_size` ids and the ranks can divide it.

    Megatron pads the vocabulary to a multiple of the tensor parallel size, and loads zeros into rows that a checkpoint
    lacks. The softmax is over all rows, so other padding changes the loss.
    """
    size = getattr(read_common_state(checkpoint).get("args"), "padded_vocab_size", None) or 0
    if size >= vocab_size and size % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = size


def check_same_model(args: Namespace, checkpoint: Path) -> None:
    """Raise `UserError` naming all differences if a checkpoint's model or tokenizer is not that of this run.

    A checkpoint of local modules also loads into Transformer Engine's modules, and the other way round, unless the
    format of the optimizer's state depends on the implementation.
    """
    state = read_common_state(checkpoint)
    saved = state.get("args")
    if saved is None:
        return
    _check_same_layers(args, saved, checkpoint)
    _check_same_arguments(args, saved, checkpoint)
    theirs, ours = getattr(saved, "tokenizer_sha256", None), args.tokenizer_sha256
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(
            f"checkpoint {checkpoint} was trained with another tokenizer ({saved.tokenizer_model}, sha256 "
            f"{theirs[:12]}…) than --tokenizer-model {args.tokenizer_model} ({ours[:12]}…)"
        )
    optimizer_format = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    loads_optimizer = args.use_distributed_optimizer and not (args.finetune or args.no_load_optim)
    if loads_optimizer and optimizer_format in _NAMELESS_OPTIMIZER_FORMATS:
        _check_same_order_of_parameters(args, saved, checkpoint)


def _check_same_layers(args: Namespace, saved: Namespace, checkpoint: Path) -> None:
    """Check that a checkpoint holds the layers of this run's pattern, if either has a pattern. Raises UserError."""
    pattern, theirs = args.hybrid_layer_pattern, saved_pattern(saved)
    if pattern is None:
        if theirs:
            raise UserError(
                f"checkpoint {checkpoint} holds a hybrid model, which cannot be loaded into a GPT model: pass "
                f"--hybrid-layer-pattern '{theirs}'"
            )
        return
    if theirs:
        is_same = theirs.replace("|", "") == pattern.replace("|", "")
        description = f"a hybrid model with --hybrid-layer-pattern '{theirs}'"
    else:
        # A hybrid model may continue the GPT model that has the same layers.
        attention = "+" if getattr(saved, "multi_latent_attention", False) else "*"
        of_gpt = FeedForwardLayers.of_args(saved).pattern(attention)
        is_same = of_gpt == without_new_layers(pattern)
        description = f"a GPT model, which continues with --hybrid-layer-pattern '{of_gpt}'"
        if counting := [flag_of(name) for name in _COUNTING_ARGUMENTS if getattr(saved, name, None) is not None]:
            raise UserError(
                f"checkpoint {checkpoint} holds a GPT model with {' and '.join(counting)}, which would select other "
                "layers in a pattern: continue with --num-layers and without --hybrid-layer-pattern"
            )
    if not is_same:
        raise UserError(f"checkpoint {checkpoint} holds {description}, not with '{pattern}'")


def _check_same_arguments(args: Namespace, saved: Namespace, checkpoint: Path) -> None:
    """Check that a checkpoint's model has the sizes and the functions of this run's model. Raises UserError."""
    names = _MODEL_ARGUMENTS if args.hybrid_layer_pattern is not None else (*_LAYER_ARGUMENTS, *_MODEL_ARGUMENTS)
    differences = [
        f"{flag_of(name)} {getattr(saved, name)} in the checkpoint, {getattr(args, name)} in this run"
        for name in names
        if hasattr(saved, name)
        and getattr(saved, name) != getattr(args, name, None)
        # The values of these arguments are arbitrary otherwise.
        and (name != "num_query_groups" or args.group_query_attention)
        and (name != "max_position_embeddings" or args.position_embedding_type == "learned_absolute")
        and (name != "mtp_use_repeated_layer" or (args.mtp_num_layers or 0) > 1)
    ]
    if differences:
        raise UserError(f"checkpoint {checkpoint} holds another model: {'; '.join(differences)}")
    for name in _YARN_WITHOUT_FLAGS:
        if (value := getattr(saved, name, None)) != getattr(args, name, None):
            raise UserError(
                f"checkpoint {checkpoint} holds a model with {name} {value}, for which Megatron has no flag: pass "
                "--use-checkpoint-args"
            )


def _check_same_order_of_parameters(args: Namespace, saved: Namespace, checkpoint: Path) -> None:
    """Check that this run can load an optimizer state without names, in the order of parameters. Raises UserError."""
    implementation = getattr(saved, "transformer_impl", args.transformer_impl)
    cure = (
        "save a checkpoint with --dist-ckpt-optim-fully-reshardable, or pass --no-load-optim until the first checkpoint"
    )
    if args.hybrid_layer_pattern is not None and saved_pattern(saved) is None:
        raise UserError(
            f"checkpoint {checkpoint} holds a GPT model, and its optimizer state is in the order of its parameters, "
            f"which a hybrid model does not have: {cure}"
        )
    if implementation != args.transformer_impl:
        raise UserError(
            f"checkpoint {checkpoint} was saved with --transformer-impl {implementation}, and its optimizer state "
            f"is in the order of its parameters, which differs from {args.transformer_impl}'s: {cure}"
        )


def flag_of(name: str) -> str:
    """Return the flag that sets an argument."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
