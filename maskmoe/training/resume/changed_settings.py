"""The settings of a checkpoint: a run takes them over, or compares them with its own.

What Megatron itself refuses is not here.
"""

from argparse import Namespace
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, get_hybrid_total_pipeline_segment_count
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training
from megatron.training.checkpointing import load_args_from_checkpoint

from maskmoe.checkpoint.integrity import iteration_of
from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.saved_names import saved_pattern
from maskmoe.checkpoint.series import temporary_load_folder
from maskmoe.errors import UserError, megatrons_checks, reason_of
from maskmoe.megatron_compat.globals import global_args
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.training.settings.samples import BatchSizes, requested_training_samples, training_iterations

_PAGE = "docs/extending.md"

# The names of arguments, by what a change of them means when a run loads a checkpoint.
# The sizes of parameters, and what layers compute with them, must be equal. `--use-checkpoint-args` takes the
# checkpoint's values.
_MODEL = """
    quick_geglu glu_linear_offset activation_func_clamp_value moe_apply_probs_on_input attention_output_gate
    softmax_type qk_l2_norm squared_relu rotary_interleaved layernorm_zero_centered_gamma use_mup
    mtp_use_repeated_layer hidden_size ffn_hidden_size swiglu add_bias_linear num_attention_heads
    group_query_attention kv_channels multi_latent_attention add_qkv_bias qk_layernorm qk_layernorm_all_heads
    normalization layernorm_epsilon num_experts moe_ffn_hidden_size moe_router_enable_expert_bias moe_latent_size
    moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size moe_shared_expert_intermediate_size
    moe_shared_expert_gate position_embedding_type untie_embeddings_and_output_weights q_lora_rank kv_lora_rank
    qk_head_dim qk_pos_emb_head_dim v_head_dim original_max_position_embeddings beta_fast beta_slow
    linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    tokenizer_sha256
"""
# A run may change these arguments on purpose, for example for longer sequences. A change is noted, because the weights
# were trained with another value. `--use-checkpoint-args` takes the checkpoint's values.
_FUNCTION = """
    moe_router_num_groups moe_router_group_topk moe_expert_capacity_factor moe_token_drop_policy
    moe_pad_expert_input_to_capacity window_size window_attn_skip_freq no_rope_freq use_rope_scaling
    rope_scaling_factor rotary_seq_len_interpolation_factor rope_type rotary_scaling_factor mscale mscale_all_dim
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor rotary_base
    rotary_percent
"""
# Must be equal unless the optimizer begins anew. Megatron would fail, or load the checkpoint's values.
_OPTIMIZER = """
    optimizer use_distributed_optimizer use_layer_wise_distributed_optimizer muon_scalar_optimizer decoupled_lr
    decoupled_min_lr adam_beta1 adam_beta2 adam_eps muon_momentum lion_beta1 lion_beta2
"""
# A change is noted, because the run continues within another order of the data.
_DATA = "datasets_digest mock_data split seq_length seed dataloader_type fim_data"
# The order of the data also depends on these arguments with `--dataloader-type cyclic`.
_DATA_OF_CYCLIC_ORDER = "data_sharding micro_batch_size data_parallel_size"
# How the user knows arguments that do not have the names of their flags.
_FLAGS = {
    "tokenizer_sha256": "the digest of --tokenizer-model",
    "datasets_digest": "the digest of the datasets' sizes, beginnings and weights",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "use_layer_wise_distributed_optimizer": "--use-distributed-optimizer",  # with Muon and Lion
}
# Arguments that are None if they are unknown: for some tokenizers, or for missing datasets.
_DIGESTS = ("tokenizer_sha256", "datasets_digest")
# Arguments that decide the kinds and the number of layers, if there is no pattern.
_LAYERS = "num_layers mtp_num_layers moe_layer_freq"


# ---- The model -------------------------------------------------------------------------------------------------------


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
    chosen = {name: getattr(saved, name) for name in (_MODEL + _FUNCTION).split() if hasattr(saved, name)}
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
    names = _MODEL if args.hybrid_layer_pattern is not None else _MODEL + _LAYERS
    fault = _other_layers(args, saved)
    if not fault and (changed := _differences(args, saved, names)):
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
        # These arguments choose layers by number. A layer of a GPT model has one number, and two in a pattern.
        for name in ("window_attn_skip_freq", "no_rope_freq"):
            if getattr(saved, name, None) is not None:
                return f"has {_flag_of(name)}, which would select other layers in a pattern: pass --num-layers instead"
        attention = "+" if getattr(saved, "multi_latent_attention", False) else "*"
        theirs = FeedForwardLayers.of_args(saved).pattern(attention)
    is_same = theirs.replace(Symbols.PIPE, "") == pattern.replace(Symbols.PIPE, "")
    return "" if is_same else f"continues with --hybrid-layer-pattern '{theirs}', not with '{pattern}'"


def _other_order_of_parameters(args: Namespace, saved: Namespace, metadata: dict[str, Any]) -> str:
    """Return what is wrong if an optimizer state without names, in the order of parameters, is of another order."""
    is_nameless = metadata.get("distrib_optim_sharding_type") in ("dp_reshardable", "dp_zero_gather_scatter")
    changed = _differences(args, saved, "transformer_impl")
    if not (is_nameless and changed and args.use_distributed_optimizer) or args.finetune or args.no_load_optim:
        return ""
    return (
        f"holds an optimizer state in the order of its parameters, which this run's model does not have ({changed}): "
        "save a checkpoint with --dist-ckpt-optim-fully-reshardable, or pass --no-load-optim until the first checkpoint"
    )


# ---- The training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChangedSettings:
    """The differences between a run and the run that saved its checkpoint.

    Attributes:
        errors: The changes with which the run would fail, or that it would ignore; one line each.
        notes: The changes that take effect, one line each.
        is_complete: Whether the checkpoint has reached the end of training.
    """

    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_complete: bool = False


def find_changed_settings(args: Namespace, checkpoint: Path | None) -> ChangedSettings:
    """Compare validated settings with a checkpoint's, if there is one; raise `UserError` for a refused schedule."""
    schedule = None if args.skip_train else _schedule_of(args)
    iteration = None if checkpoint is None else iteration_of(checkpoint)
    if checkpoint is None or iteration is None:  # a converted checkpoint has weights only
        return ChangedSettings()
    state = read_common_state(checkpoint)
    saved = state.get("args")
    if saved is None or (schedule is not None and args.finetune):
        return ChangedSettings()
    if schedule is None:  # nothing is trained
        return ChangedSettings(notes=tuple(_notes_of_weights(args, saved)))
    errors = [*_errors_of_length(args, saved, iteration)]
    if not args.no_load_optim and "opt_param_scheduler" in state:
        errors += _errors_of_optimizer(args, saved, schedule, state["opt_param_scheduler"])
    is_complete = iteration >= training_iterations(args)
    if is_complete:
        end = f"--train-samples {args.train_samples}" if args.train_samples else f"--train-iters {args.train_iters}"
        left = "nothing is left to train; to train on, pass a larger number"
        notes = [f"the checkpoint has reached {end}: {left} ({_PAGE})"]
    else:
        notes = [*_notes(args, saved, iteration)]
    return ChangedSettings(tuple(f"checkpoint {checkpoint} {error}" for error in errors), tuple(notes), is_complete)


def _schedule_of(args: Namespace) -> OptimizerParamScheduler:
    """Return the scheduler of validated arguments, without an optimizer; raise `UserError` if Megatron refuses it."""
    optimizer: Any = SimpleNamespace(param_groups=[])
    completed = copy(args)  # Megatron completes the arguments
    completed.step_batch_size_schedule = None  # for the number of iterations, which the scheduler does not use
    refused = "Megatron refuses the schedule of the learning rate or the weight decay"
    with megatrons_checks(refused), global_args(completed), redirect_stdout(None):
        return training.get_optimizer_param_scheduler(optimizer)


def has_one_learning_rate(args: Namespace) -> bool:
    """Return whether all parameters have the learning rate in `--lr`."""
    return args.decoupled_lr is None and not args.use_mup


def _errors_of_length(args: Namespace, saved: Namespace, iteration: int) -> Iterator[str]:
    """Yield an error if Megatron would compute a wrong last iteration from `--train-samples` and the batch size."""
    samples = getattr(saved, "consumed_train_samples", None)
    if args.train_samples is None or samples is None:
        return
    iterations = BatchSizes.from_args(args).iterations(samples)
    if iterations != iteration:
        yield (
            f"has read {samples:,} samples in {iteration} iterations, which are {iterations} iterations with this "
            f"run's batch sizes, so training would not end at --train-samples {args.train_samples}: pass a "
            f"--step-batch-size-schedule that begins with the checkpoint's batch sizes, or --train-iters ({_PAGE})"
        )


def _errors_of_optimizer(
    args: Namespace, saved: Namespace, schedule: OptimizerParamScheduler, saved_schedule: dict[str, Any]
) -> Iterator[str]:
    """Yield an error for each change of the optimizer or the schedule with which the run cannot load their states."""
    if changed := _differences(args, saved, _OPTIMIZER):
        yield (
            f"holds the state of another optimizer: {changed}; pass the checkpoint's settings, or --no-load-optim to "
            "begin with a new optimizer and a new schedule, and remove --no-load-optim after the first checkpoint "
            f"({_PAGE})"
        )
    changed = ""
    try:
        copy(schedule).load_state_dict(saved_schedule)
        # The schedule counts samples, so Megatron accepts fewer iterations with a larger batch.
        if not (args.train_samples or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
            changed = _differences(args, saved, "global_batch_size")
    except AssertionError as refusal:
        changed = reason_of(refusal)
    if changed:
        yield (
            f"was saved with another schedule of learning rate and weight decay ({changed}): pass "
            "--override-opt-param-scheduler to continue by this run's schedule, the checkpoint's settings to keep its "
            f"schedule, or --finetune with another --save to start anew from the weights ({_PAGE})"
        )


def _notes(args: Namespace, saved: Namespace, iteration: int) -> Iterator[str]:
    """Yield a note for each change that takes effect although nobody asked for it."""
    if args.no_load_optim:
        yield (
            f"--no-load-optim: a new optimizer continues at iteration {iteration}, and the schedule of the learning "
            "rate begins anew, at every start: remove the flag after the first checkpoint"
        )
    consumed = getattr(saved, "consumed_train_samples", 0)
    before, now = (requested_training_samples(each, iteration, consumed) for each in (saved, args))
    of_order = f"{_DATA} {_DATA_OF_CYCLIC_ORDER}" if args.dataloader_type == "cyclic" else _DATA
    if changed := _differences(args, saved, of_order):
        yield (
            f"the training data are in another order ({changed}): the run continues at sample {consumed:,} of the new "
            "order, so it may repeat samples and leave samples out"
        )
    elif before != now and not args.mock_data:
        yield (
            f"the run reads {now:,} samples, not {before:,}: if these are other epochs of a dataset, Megatron shuffles "
            f"the data into another order ({_PAGE}), and the run may repeat samples and leave samples out"
        )
    yield from _notes_of_weights(args, saved)


def _notes_of_weights(args: Namespace, saved: Namespace) -> Iterator[str]:
    """Yield a note if the checkpoint's weights compute something else than in the run that saved them."""
    if changed := _differences(args, saved, f"{_FUNCTION} padded_vocab_size"):
        yield f"the checkpoint's weights were trained with other settings: {changed}"


# ---- Differences -----------------------------------------------------------------------------------------------------


def _flag_of(name: str) -> str:
    """Return the flag that sets an argument."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _differences(args: Namespace, saved: Namespace, names: str) -> str:
    """Describe the arguments that differ between a run and a checkpoint, with both values; empty if there are none."""
    parts = []
    for name in names.split():
        now = getattr(args, name, None)
        before = getattr(saved, name, now)
        if before != now and not (name in _DIGESTS and None in (before, now)):
            parts.append(f"{_flag_of(name)} {before} in the checkpoint, {now} in this run")
    return "; ".join(parts)
