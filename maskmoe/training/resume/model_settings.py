"""Settings of a checkpoint's model: a run takes them over, or compares them with its own."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, get_hybrid_total_pipeline_segment_count
from megatron.training.checkpointing import load_args_from_checkpoint

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.saved_names import saved_pattern
from maskmoe.checkpoint.series import temporary_load_folder
from maskmoe.errors import UserError
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.training.resume.settings_table import Rule, differences, flag_of, names_of

# Arguments that decide the kinds and the number of layers, if there is no pattern.
_LAYER_ARGUMENTS = ("num_layers", "mtp_num_layers", "moe_layer_freq")
# Arguments that choose layers by their numbers, of which a layer of a GPT model has one and its pattern has two.
_COUNTING_ARGUMENTS = ("window_attn_skip_freq", "no_rope_freq")
# Formats in which the distributed optimizer saves its state in the order of a model's parameters, without their names.
_NAMELESS_OPTIMIZER_FORMATS = ("dp_reshardable", "dp_zero_gather_scatter")


def take_settings_of_checkpoint(args: Namespace, checkpoint: Path, given: Collection[str] = ()) -> Namespace:
    """Return the arguments, completed by the settings of a checkpoint's model and, by Megatron, by further settings.

    Megatron alone would replace many settings of the command line by the checkpoint's. `given` names the arguments that
    the command line gives; they keep their values. Exception: with a layer pattern, `num_layers` and `moe_layer_freq`
    are reset, because the pattern decides them.
    """
    given_values = {name: value for name, value in vars(args).items() if name in given}
    vars(args).update(settings_of_checkpoint(args, checkpoint) | given_values)
    with temporary_load_folder(checkpoint, args):
        args, _ = load_args_from_checkpoint(args)
    tokenizer_type = given_values.get("tokenizer_type", args.tokenizer_type)
    if tokenizer_type != args.tokenizer_type or tokenizer_type == "NullTokenizer":  # which needs no model
        args.tokenizer_model = None
    vars(args).update(given_values)
    if args.hybrid_layer_pattern is not None:  # which decides the layers; the checkpoint may be a GPT model's
        args.num_layers, args.moe_layer_freq = None, 1
    return args


def settings_of_checkpoint(args: Namespace, checkpoint: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's model that Megatron's `--use-checkpoint-args` leaves out or takes wrongly.

    Megatron takes the pattern of a hybrid model as it is, with the bounds of the pipeline stages of the run that saved
    the checkpoint. They are left out if this run has another number of stages.
    """
    saved = read_common_state(checkpoint).get("args", Namespace())
    names = names_of(Rule.MODEL, Rule.FUNCTION)
    chosen = {name: getattr(saved, name) for name in names if hasattr(saved, name)}
    if pattern := saved_pattern(saved):
        is_divided_alike = get_hybrid_total_pipeline_segment_count(pattern) == args.pipeline_model_parallel_size
        chosen["hybrid_layer_pattern"] = pattern if is_divided_alike else pattern.replace(Symbols.PIPE, "")
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
    names = names_of(Rule.MODEL)
    if args.hybrid_layer_pattern is None:
        names += _LAYER_ARGUMENTS
    fault = _other_layers(args, saved)
    if not fault and (changed := differences(args, saved, names)):
        fault = f"holds another model: {changed}; --use-checkpoint-args takes the checkpoint's settings"
    if fault or (fault := _other_order_of_parameters(args, saved, state.get("content_metadata") or {})):
        raise UserError(f"checkpoint {checkpoint} {fault}")


def _other_layers(args: Namespace, saved: Namespace) -> str:
    """Return what is wrong if a checkpoint does not hold the layers of this run's pattern, if either has a pattern."""
    pattern, theirs = args.hybrid_layer_pattern, saved_pattern(saved)
    if pattern is None:
        cannot = "holds a hybrid model, which cannot be loaded into a GPT model: pass --hybrid-layer-pattern"
        return f"{cannot} '{theirs}'" if theirs else ""
    if theirs is None:  # a hybrid model may continue the GPT model that has the same layers
        if counting := [flag_of(name) for name in _COUNTING_ARGUMENTS if getattr(saved, name, None) is not None]:
            return f"has {counting[0]}, which would select other layers in a pattern: pass --num-layers instead"
        attention = "+" if getattr(saved, "multi_latent_attention", False) else "*"
        theirs = FeedForwardLayers.of_args(saved).pattern(attention)
    is_same = theirs.replace(Symbols.PIPE, "") == pattern.replace(Symbols.PIPE, "")
    return "" if is_same else f"continues with --hybrid-layer-pattern '{theirs}', not with '{pattern}'"


def _other_order_of_parameters(args: Namespace, saved: Namespace, metadata: dict[str, Any]) -> str:
    """Return what is wrong if an optimizer state without names, in the order of parameters, is of another order."""
    is_nameless = metadata.get("distrib_optim_sharding_type") in _NAMELESS_OPTIMIZER_FORMATS
    changed = differences(args, saved, ["transformer_impl"])
    if not (is_nameless and changed and args.use_distributed_optimizer) or args.finetune or args.no_load_optim:
        return ""
    return (
        f"holds an optimizer state in the order of its parameters, which this run's model does not have ({changed}): "
        "save a checkpoint with --dist-ckpt-optim-fully-reshardable, or pass --no-load-optim until the first checkpoint"
    )
