"""The arguments that matter when a run resumes from a checkpoint: what a change of them means."""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from maskmoe.transformer.torch_modules import gated_delta_net


class Rule(Enum):
    """The rule for an argument that differs from the checkpoint's; `--use-checkpoint-args` takes the first two kinds.

    Attributes:
        MODEL: The run is refused: the checkpoint holds another model.
        FUNCTION: The run notes that the weights were trained with another value.
        TRAINED_WITH: The same, for arguments that Megatron's own `--use-checkpoint-args` takes, or nobody.
        OPTIMIZER: The run is refused: the state of the optimizer is of another kind.
        IGNORED: The run is refused: Megatron would silently load the checkpoint's value with the optimizer.
        SCHEDULE: The run is refused, unless a flag says whose schedule holds.
        DATA: The run notes that it continues within another order of the data.
    """

    MODEL = auto()
    FUNCTION = auto()
    TRAINED_WITH = auto()
    OPTIMIZER = auto()
    IGNORED = auto()
    SCHEDULE = auto()
    DATA = auto()


_TABLE = {
    # Sizes of the parameters, or what layers compute from them.
    Rule.MODEL: """
        quick_geglu glu_linear_offset activation_func_clamp_value moe_apply_probs_on_input attention_output_gate
        softmax_type qk_l2_norm squared_relu rotary_interleaved layernorm_zero_centered_gamma use_mup
        mtp_use_repeated_layer hidden_size ffn_hidden_size swiglu add_bias_linear num_attention_heads
        group_query_attention num_query_groups kv_channels multi_latent_attention add_qkv_bias qk_layernorm
        qk_layernorm_all_heads normalization layernorm_epsilon num_experts moe_ffn_hidden_size
        moe_router_enable_expert_bias moe_latent_size moe_mlp_glu_interleave_size
        moe_shared_expert_glu_interleave_size moe_shared_expert_intermediate_size moe_shared_expert_gate
        position_embedding_type max_position_embeddings untie_embeddings_and_output_weights q_lora_rank kv_lora_rank
        qk_head_dim qk_pos_emb_head_dim v_head_dim original_max_position_embeddings beta_fast beta_slow
        tokenizer_sha256
    """,
    # Arguments that a run may change on purpose, for example for longer sequences.
    Rule.FUNCTION: """
        moe_router_num_groups moe_router_group_topk moe_expert_capacity_factor moe_token_drop_policy
        moe_pad_expert_input_to_capacity window_size window_attn_skip_freq no_rope_freq use_rope_scaling
        rope_scaling_factor rotary_seq_len_interpolation_factor rope_type rotary_scaling_factor mscale mscale_all_dim
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
        mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    """,
    Rule.TRAINED_WITH: """
        moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor rotary_base
        rotary_percent padded_vocab_size moe_router_force_load_balancing moe_router_force_biased
    """,
    Rule.OPTIMIZER: """
        optimizer use_distributed_optimizer use_layer_wise_distributed_optimizer muon_scalar_optimizer decoupled_lr
        decoupled_min_lr bf16 fp16
    """,
    Rule.IGNORED: "adam_beta1 adam_beta2 adam_eps muon_momentum lion_beta1 lion_beta2",
    Rule.SCHEDULE: """
        train_iters train_samples global_batch_size lr min_lr decoupled_lr decoupled_min_lr lr_decay_style
        lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples lr_warmup_fraction lr_warmup_init
        lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style weight_decay start_weight_decay end_weight_decay
        weight_decay_incr_style
    """,
    Rule.DATA: """
        data_path train_data_path data_args_path per_split_data_args_path mock_data split seq_length seed
        dataloader_type fim_data datasets_digest
    """,
}
# How the user knows arguments that do not have the names of their flags. Megatron has no flags for three settings of
# YaRN; converted checkpoints have them if they differ from Megatron's values.
_FLAGS = {
    "original_max_position_embeddings": "original_max_position_embeddings (pass --use-checkpoint-args)",
    "beta_fast": "beta_fast (pass --use-checkpoint-args)",
    "beta_slow": "beta_slow (pass --use-checkpoint-args)",
    "tokenizer_sha256": "the digest of --tokenizer-model",
    "datasets_digest": "the digest of the datasets' sizes and beginnings",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "use_layer_wise_distributed_optimizer": "--use-distributed-optimizer",  # with Muon and Lion
}


def names_of(*rules: Rule) -> list[str]:
    """Return the arguments under some rules."""
    return [name for rule in rules for name in _TABLE[rule].split()]


def taken_arguments() -> list[str]:
    """Return the arguments that Megatron's `--use-checkpoint-args` leaves out."""
    return [*names_of(Rule.MODEL, Rule.FUNCTION), *gated_delta_net.SIZES]


def flag_of(name: str) -> str:
    """Return the flag that sets an argument."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class Changes:
    """Compares the arguments of a run with those in a checkpoint."""

    args: Namespace
    saved: Namespace

    def describe(self, names: Iterable[str]) -> str:
        """Describe the arguments that differ, with both values; empty if there are none."""
        return "; ".join(
            f"{flag_of(name)} {_text(getattr(self.saved, name))} in the checkpoint, "
            f"{_text(getattr(self.args, name, None))} in this run"
            for name in self._changed(names)
        )

    def _changed(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            if hasattr(self.saved, name) and not self._has_no_meaning(name):
                before, now = getattr(self.saved, name), getattr(self.args, name, None)
                if before != now and not (name.endswith("data_path") and _absolute(before) == _absolute(now)):
                    yield name

    def _has_no_meaning(self, name: str) -> bool:
        """Return whether Megatron derives an argument from other arguments, or does not use it."""
        args, saved = self.args, self.saved
        optimizers = {args.optimizer, getattr(saved, "optimizer", args.optimizer)}
        match name:
            case "num_query_groups":
                return not args.group_query_attention
            case "max_position_embeddings":
                return args.position_embedding_type != "learned_absolute"
            case "mtp_use_repeated_layer":
                return (args.mtp_num_layers or 0) <= 1
            case "tokenizer_sha256" | "datasets_digest":  # unknown for some tokenizers, or for missing datasets
                return None in (getattr(args, name, None), getattr(saved, name))
            case "lr_decay_iters" | "lr_decay_samples":  # from --train-iters or --train-samples
                return getattr(args, name) is None
            case "train_iters":
                return args.train_samples is not None and getattr(saved, "train_samples", None) is not None
            case "global_batch_size":  # from --micro-batch-size
                return any(getattr(each, "step_batch_size_schedule", None) is not None for each in (args, saved))
            case "use_distributed_optimizer" | "use_layer_wise_distributed_optimizer":
                return len(optimizers) > 1  # both from one flag and the optimizer
            case "bf16" | "fp16":  # the distributed optimizer has the same state in every precision
                return args.use_distributed_optimizer
            case "muon_scalar_optimizer" | "muon_momentum":
                return optimizers <= {"adam", "sgd"}
            case "lion_beta1" | "lion_beta2":
                return optimizers <= {"adam", "sgd", "lion"}  # Lion reads Adam's flags
        return False


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _absolute(words: list[str] | None) -> list[str] | None:
    """Return the words of `--data-path` with absolute paths; weights become paths, too, which is harmless."""
    return None if words is None else [str(Path(word).resolve()) for word in words]
