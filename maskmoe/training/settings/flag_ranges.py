"""The ranges of Megatron's flags, and of MaskMoE's flags beside them, in one table.

Megatron checks few of its numbers. Some others fail late, after the model was built or when a first checkpoint is due,
and some never fail: a learning rate of NaN trains.
"""

import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from math import isfinite, prod
from types import MethodType
from typing import Any

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import Number, OneLineParser, WholeNumber, split
from maskmoe.errors import UserError

_COUNT, _POSITIVE = WholeNumber(0), WholeNumber(1)
_NOT_NEGATIVE, _ABOVE_ZERO = Number(0), Number(0, is_above=True)
_PORT = ranges.PORT

# The flags of each range, by the names of their settings in Megatron's arguments.
_SETTINGS: tuple[tuple[WholeNumber | Number, str], ...] = (
    (
        ranges.LAYERS,
        """
        num_layers encoder_num_layers decoder_num_layers
        """,
    ),
    (
        WholeNumber(0, ranges.LAYERS.most),
        """
        mtp_num_layers recompute_num_layers cpu_offloading_num_layers num_layers_at_start_in_bf16
        num_layers_at_end_in_bf16 decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        """,
    ),
    (
        ranges.HIDDEN_SIZE,
        """
        hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels moe_ffn_hidden_size
        moe_shared_expert_intermediate_size moe_latent_size linear_key_head_dim linear_value_head_dim
        linear_num_key_heads linear_num_value_heads linear_conv_kernel_dim mamba_state_dim mamba_head_dim
        mamba_num_groups mamba_num_heads q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
        mup_base_hidden_size dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk mrope_section
        moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
        """,
    ),
    (
        ranges.EXPERTS,
        """
        num_experts moe_router_topk moe_router_num_groups moe_router_group_topk moe_upcycling_granularity
        """,
    ),
    (
        ranges.SEQ_LENGTH,
        """
        seq_length encoder_seq_length decoder_seq_length max_position_embeddings yarn_original_max_position_embeddings
        relative_attention_num_buckets relative_attention_max_distance max_seqlen_per_dp_cp_rank
        """,
    ),
    (
        ranges.VOCAB_SIZE,
        """
        vocab_size padded_vocab_size make_vocab_size_divisible_by
        """,
    ),
    (
        WholeNumber(0, ranges.VOCAB_SIZE.most),
        """
        vocab_extra_ids tiktoken_num_special_tokens null_tokenizer_eod_id
        """,
    ),
    (
        ranges.RANKS,
        """
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size hierarchical_context_parallel_sizes num_distributed_optimizer_instances
        tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards replication_factor replication_jump
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
        microbatch_group_size_per_vp_stage inprocess_active_world_size
        """,
    ),
    (
        ranges.BATCH_SIZE,
        """
        micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size
        """,
    ),
    (
        _POSITIVE,
        """
        train_iters train_samples log_interval eval_interval save_interval exit_interval exit_duration_in_mins
        tensorboard_log_interval tensorboard_queue_size log_memory_interval save_retain_interval
        save_tokens_per_expert_interval non_persistent_save_interval save_params_interval save_activations_interval
        save_wgrads_interval save_dgrads_interval lr_decay_iters lr_decay_samples lr_wsd_decay_iters
        lr_wsd_decay_samples check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
        train_sync_interval distributed_timeout_minutes distributed_timeout_seconds_after_init dist_ckpt_workers
        num_dataset_builder_threads keep_last_checkpoints fp8_interval fp8_amax_history_len muon_num_ns_steps
        hysteresis ddp_num_buckets ddp_bucket_size rotary_base rotary_seq_len_interpolation_factor
        adlr_autoresume_interval dsa_indexer_topk_freq mlp_chunks_for_prefill mlp_chunks_for_training
        moe_paged_stash_page_size suggested_communication_unit_size inprocess_max_iterations straggler_minmax_count
        moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_routing_trace_max_training_iters
        logits_load_decode_threads logits_load_prefetch_factor fine_grained_offloading_max_inflight_offloads
        """,
    ),
    (
        _COUNT,
        """
        collapse_intervals
        eval_iters lr_warmup_iters lr_warmup_samples start_eval_at_iter iterations_to_skip rampup_batch_size ckpt_step
        override_ckpt_iteration manual_gc_interval cuda_graph_warmup_steps profile_step_start profile_step_end
        profile_ranks wgrad_deferral_limit flight_recorder_trace_buffer_size min_offloaded_tensor_size
        delta_offload_bytes_across_pp_ranks ft_num_warmup_iters dsa_indexer_skip_topk_offset fp8_margin
        logits_load_msc_prefetch_depth logits_save_top_k logits_save_top_p_min_k logging_level
        async_ckpt_cpu_priority async_ckpt_io_priority error_injection_rate local_rank
        """,
    ),
    (WholeNumber(2, 100_000), "spike_window"),
    (WholeNumber(0, ranges.PROCESSES.most), "num_workers"),
    (ranges.SEED, "seed"),
    (_PORT, "straggler_ctrlr_port"),
    (
        ranges.SHARE,
        """
        hidden_dropout attention_dropout lr_warmup_fraction rotary_percent adam_beta1 adam_beta2 sgd_momentum
        muon_momentum lion_beta1 lion_beta2 fim_rate fim_spm_rate fim_fragment_rate moe_router_quantile_balancing_ema
        optimizer_offload_fraction activation_offload_fraction moe_input_jitter_eps mask_prob short_seq_prob
        """,
    ),
    (Number(0, 1e3), "lr min_lr lr_warmup_init decoupled_lr decoupled_min_lr"),
    (
        _NOT_NEGATIVE,
        """
        weight_decay start_weight_decay end_weight_decay clip_grad moe_aux_loss_coeff moe_z_loss_coeff
        moe_router_bias_update_rate mtp_loss_scaling_factor init_method_std embedding_init_method_std
        dsa_indexer_loss_coeff mscale mscale_all_dim min_loss_scale logits_load_kd_loss_alpha
        """,
    ),
    (
        _ABOVE_ZERO,
        """
        spike_deviations
        layernorm_epsilon adam_eps hang_timeout moe_expert_capacity_factor moe_expert_rank_capacity_factor
        moe_router_topk_scaling_factor rope_scaling_factor rotary_scaling_factor loss_scale initial_loss_scale
        loss_scale_window activation_func_clamp_value dsa_indexer_k_norm_epsilon mup_width_mult mup_embedding_mult
        mup_output_mult mup_base_head_dim qk_clip_alpha qk_clip_threshold
        """,
    ),
)
RANGES = {name: range_ for range_, names in _SETTINGS for name in names.split()}
"""The range of each setting, by its name in Megatron's arguments."""

UNBOUNDED = {
    *("batch_size", "model_parallel_size", "warmup"),  # Megatron refuses every value of these old flags
    "empty_unused_memory_level",  # Megatron names its values
    "null_tokenizer_pad_id",  # -1 stands for no id
    # The flags of retrieval, vision, reinforcement learning, inference and tests of failures are ignored by training.
    *("ict_head_size", "biencoder_projection_dim", "retriever_report_topk_accuracies", "indexer_batch_size"),
    *("indexer_log_interval", "num_classes", "img_h", "img_w", "num_channels", "patch_dim", "iter_per_epoch"),
    *("dino_local_img_size", "dino_local_crops_number", "dino_head_hidden_size", "dino_bottleneck_size"),
    *("dino_warmup_teacher_temp_epochs", "rl_prompts_per_eval", "grpo_prompts_per_step", "grpo_group_size"),
    *("rl_generation_lag", "grpo_iterations", "rl_default_top_k", "rl_sequence_packing_max_sequences_per_bin"),
    *("rl_inference_tensor_model_parallel_size", "rl_inference_pipeline_model_parallel_size"),
    *("rl_inference_expert_model_parallel_size", "rl_inference_expert_tensor_model_parallel_size"),
    *("inference_batch_times_seqlen_threshold", "max_tokens_to_oom", "inference_max_requests"),
    *("inference_max_seq_length", "inference_dynamic_batching_block_size", "inference_dynamic_batching_max_requests"),
    *("inference_dynamic_batching_max_tokens", "inference_dynamic_batching_num_cuda_graphs"),
    *("inference_cuda_graph_max_tokens", "num_speculative_tokens", "inference_logging_step_interval"),
    *("inference_dynamic_batching_cuda_graph_mixed_prefill_count", "inference_coordinator_port"),
    *("fault_injector_num_ranks", "fault_injector_delay_start_iteration", "fault_injector_seed"),
}
"""The whole numbers of Megatron's arguments that may have any value."""

# Megatron's names of settings that do not follow from the names of their flags.
_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage",
}
_LONGEST_WORD, _LONGEST_PATTERN = 100_000, 1 << 17
_FACTOR = re.compile(r"(?<=\*)\s*\d+|\d+\s*(?=\*)")


def report_errors_in_one_line(parser: ArgumentParser) -> None:
    """Let Megatron's parser report a wrong value in one line, where argparse would print a usage of 700 lines first.

    Args:
        parser: has Megatron's arguments; is changed in place.
    """
    vars(parser)["error"] = MethodType(OneLineParser.error, parser)
    for action in parser._actions:
        if callable(action.type) and not isinstance(action.type, type):
            action.type = _refusing(action, action.type)


def _refusing(action: Action, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter of a flag's words whose failures are errors of argparse.

    Args:
        action: the argument.
        convert: Megatron's converter, which may raise any exception for a word that it does not understand.
    """
    choices = [getattr(choice, "name", str(choice)) for choice in action.choices or ()]
    expected = f"must be one of {', '.join(choices)}" if choices else "has a value that Megatron cannot read"

    def convert_or_refuse(word: str) -> Any:
        try:
            return convert(check_pattern(word))
        except ArgumentTypeError:
            raise
        except Exception as error:
            raise ArgumentTypeError(f"{expected}, not {word!r}") from error

    return convert_or_refuse


def check_pattern(word: str) -> str:
    """Return a word that Megatron may evaluate, such as the pattern `[0]+[1]*23`, as it is.

    Raises:
        ArgumentTypeError: evaluating the word would take too much memory or time.
    """
    factors = map(int, _FACTOR.findall(word)) if len(word) <= _LONGEST_WORD else ()
    if len(word) > _LONGEST_WORD or "**" in word or prod(factors) > _LONGEST_PATTERN:
        raise ArgumentTypeError(f"is a pattern for too many layers: {word!r}")
    return word


def check_ranges(args: Namespace) -> None:
    """Refuse the first number that is out of its range, or contradicts another one.

    Raises:
        UserError: names the flag, its value and the range.
    """
    for error in range_errors(args):
        raise UserError(error)


def range_errors(args: Namespace) -> Iterator[str]:
    """Yield an error for each number of parsed arguments that is out of its range, or contradicts another one.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    errors = list(_errors_of_single_settings(args))
    yield from errors
    if not errors:
        yield from _contradictions(args)


def _errors_of_single_settings(args: Namespace) -> Iterator[str]:
    for name, setting in vars(args).items():
        range_ = RANGES.get(name)
        for value in setting if isinstance(setting, list | tuple) else (setting,):
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            problem = range_.problem(value) if range_ else None
            if isinstance(value, float) and not isfinite(value):
                problem = f"must be a finite number, not {value}"
            if problem:
                yield f"{_flag(name)} {problem}"
    if args.split is not None:
        try:
            split(args.split)
        except ArgumentTypeError as problem:
            yield f"--split {problem}"


def _contradictions(args: Namespace) -> Iterator[str]:
    """Yield an error for each pair of numbers of which Megatron asserts an order after it has built the model."""
    if getattr(args, "skip_train", False):
        return
    if args.lr is not None:
        for name in ("min_lr", "lr_warmup_init"):
            if (smaller := getattr(args, name)) > args.lr:
                yield f"{_flag(name)} {smaller:g} is above --lr {args.lr:g}"
    yield from _contradictory_units(args)
    for unit in ("iters", "samples"):
        warmup, total = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_decay_{unit}")
        if warmup and (steps := decay or total) is not None and warmup >= steps:
            of = f"--lr-decay-{unit}" if decay else f"--train-{unit}"
            yield f"--lr-warmup-{unit} {warmup} must be less than {of} {steps}"


def _contradictory_units(args: Namespace) -> Iterator[str]:
    """Yield an error for each length in iterations of a run whose length is in samples, and the other way round."""
    if args.train_iters is not None and args.train_samples is not None:
        yield f"--train-iters {args.train_iters} and --train-samples {args.train_samples}: pass one of the two"
        return
    unit, other = ("iters", "samples") if args.train_samples is None else ("samples", "iters")
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if length := getattr(args, f"{name}_{other}"):
            yield f"{_flag(f'{name}_{other}')} {length} with --train-{unit}: pass {_flag(f'{name}_{unit}')} instead"


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
