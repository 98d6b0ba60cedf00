"""The arguments that matter when a run resumes from a checkpoint: what a change of them means."""

from argparse import Namespace
from collections.abc import Iterable
from enum import Enum, auto


class Rule(Enum):
    """The rule for an argument that differs from the checkpoint's.

    Attributes:
        MODEL: Must be equal; `--use-checkpoint-args` takes the checkpoint's value.
        FUNCTION: Noted, because the weights were trained with another value; `--use-checkpoint-args` takes this one.
        TRAINED_WITH: Noted likewise; Megatron's own `--use-checkpoint-args` takes the checkpoint's value.
        OPTIMIZER: Must be equal unless the optimizer begins anew. Megatron would fail, or load the checkpoint's value.
        DATA: Noted, because the run continues within another order of the data.
    """

    MODEL = auto()
    FUNCTION = auto()
    TRAINED_WITH = auto()
    OPTIMIZER = auto()
    DATA = auto()


_TABLE = {
    # Sizes of the parameters, or what layers compute from them.
    Rule.MODEL: """
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
        rotary_percent padded_vocab_size
    """,
    Rule.OPTIMIZER: """
        optimizer use_distributed_optimizer use_layer_wise_distributed_optimizer muon_scalar_optimizer decoupled_lr
        decoupled_min_lr adam_beta1 adam_beta2 adam_eps muon_momentum lion_beta1 lion_beta2
    """,
    Rule.DATA: "datasets_digest mock_data split seq_length seed dataloader_type fim_data",
}
# How the user knows arguments that do not have the names of their flags.
_FLAGS = {
    "tokenizer_sha256": "the digest of --tokenizer-model",
    "datasets_digest": "the digest of the datasets' sizes, beginnings and weights",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "use_layer_wise_distributed_optimizer": "--use-distributed-optimizer",  # with Muon and Lion
}
# Arguments that are None if they are unknown: for some tokenizers, or for missing datasets.
_DIGESTS = ("tokenizer_sha256", "datasets_digest")


def names_of(*rules: Rule) -> list[str]:
    """Return the arguments under some rules."""
    return [name for rule in rules for name in _TABLE[rule].split()]


def flag_of(name: str) -> str:
    """Return the flag that sets an argument."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def differences(args: Namespace, saved: Namespace, names: Iterable[str]) -> str:
    """Describe the arguments that differ between a run and a checkpoint, with both values; empty if there are none."""
    parts = []
    for name in names:
        now = getattr(args, name, None)
        before = getattr(saved, name, now)
        if before != now and not (name in _DIGESTS and None in (before, now)):
            parts.append(f"{flag_of(name)} {before} in the checkpoint, {now} in this run")
    return "; ".join(parts)
