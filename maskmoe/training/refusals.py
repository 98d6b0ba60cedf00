"""Settings that training refuses because they do not work, or have no meaning, with masked routing."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from maskmoe.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """A setting of the command line that training does not support.

    Attributes:
        flag: the flags of the setting, with the refused values if other values are supported.
        reason: a sentence that says why the setting is not supported, and what to use instead if there is something.
        applies: returns whether parsed arguments have the setting.
    """

    flag: str
    reason: str
    applies: Callable[[Namespace], bool]

    @property
    def message(self) -> str:
        """The error that a user of the setting reads."""
        return f"{self.flag} is not supported. {self.reason}"


def _balances_by(loss_type: str) -> Callable[[Namespace], bool]:
    """Return a predicate: does the run balance the load by this type, alone or among others?"""

    def applies(args: Namespace) -> bool:
        types = args.moe_router_load_balancing_type
        return loss_type in ([types] if isinstance(types, str) else types)

    return applies


def _needs_transformer_engine(flag: str, is_given: Callable[[Namespace], bool]) -> Refusal:
    """Return the refusal of a setting that exists in Transformer Engine's modules only."""
    return Refusal(
        f"{flag} with --transformer-impl local",
        "It needs Transformer Engine: pass --transformer-impl transformer_engine on a machine that has it.",
        lambda args: args.transformer_impl == "local" and is_given(args),
    )


def _recomputes(args: Namespace, *modules: str) -> bool:
    return not set(modules).isdisjoint(args.recompute_modules or ())


REFUSALS = (
    Refusal(
        "--routing-mask without --num-experts",
        "A model without experts has nothing to route.",
        lambda args: args.routing_mask is not None and not args.num_experts,
    ),
    Refusal(
        "--moe-token-dispatcher-type flex",
        "The libraries that this dispatcher calls, such as DeepEP, have not been tried with tokens that have fewer "
        "than k experts. Use alltoall or allgather.",
        lambda args: args.moe_token_dispatcher_type == "flex",
    ),
    Refusal(
        "--moe-router-load-balancing-type sinkhorn",
        "Sinkhorn assigns an equal share of the tokens to every expert, which a routing mask rules out.",
        _balances_by("sinkhorn"),
    ),
    Refusal(
        "--moe-router-load-balancing-type quantile_balancing",
        "Quantile balancing computes its bias from the logits of all experts, invisible experts included.",
        _balances_by("quantile_balancing"),
    ),
    Refusal(
        "--moe-router-fusion",
        "Transformer Engine's fused kernel ignores the routing mask.",
        lambda args: args.moe_router_fusion,
    ),
    Refusal(
        "--moe-pad-expert-input-to-capacity with --moe-router-enable-expert-bias",
        "The bias would never move: it is updated from the padded load, which is equal for all experts.",
        lambda args: (
            args.moe_expert_capacity_factor is not None
            and args.moe_pad_expert_input_to_capacity
            and args.moe_router_enable_expert_bias
        ),
    ),
    Refusal(
        "--moe-router-padding-for-quantization",
        "The padding is for fp8 and fp4, which have not been tried.",
        lambda args: args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8,
    ),
    Refusal(
        "--moe-enable-routing-replay",
        "Replay repeats recorded choices and ignores the routing mask.",
        lambda args: args.moe_enable_routing_replay,
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "The schedule of the overlap drops the token ids.",
        lambda args: args.overlap_moe_expert_parallel_comm,
    ),
    Refusal(
        "--mlp-chunks-for-training above 1",
        "Computing the MLP in chunks drops the token ids.",
        lambda args: (args.mlp_chunks_for_training or 1) > 1,
    ),
    Refusal(
        "--cuda-graph-impl other than none",
        "A CUDA graph needs fixed shapes, but the number of rows that a rank sends varies.",
        lambda args: args.cuda_graph_impl != "none",
    ),
    Refusal(
        "--recompute-modules moe with fp8 or fp4",
        "Recomputing experts in fp8 or fp4 has not been tried.",
        lambda args: bool(args.fp8 or args.fp4) and _recomputes(args, "moe"),
    ),
    Refusal(
        "--moe-use-upcycling",
        "A dense checkpoint holds no routing mask. Convert the checkpoint with tools/convert_checkpoint.py upcycle.",
        lambda args: args.moe_use_upcycling,
    ),
    Refusal(
        "--sft or --dataloader-inter-document-masking",
        "Both pack sequences, and the bounds of packed sequences do not reach the later pipeline stages.",
        lambda args: args.sft or args.dataloader_inter_document_masking,
    ),
    Refusal(
        "--hybrid-context-parallel",
        "Hybrid context parallelism divides sequences in another way than the token ids are divided.",
        lambda args: args.hybrid_context_parallel,
    ),
    Refusal(
        "--qk-layernorm-all-heads without --qk-layernorm and --normalization RMSNorm",
        "The flag changes the RMSNorms of --qk-layernorm, so it needs both.",
        lambda args: args.qk_layernorm_all_heads and not (args.qk_layernorm and args.normalization == "RMSNorm"),
    ),
    Refusal("--spec", "MaskMoE builds the layer specification itself.", lambda args: args.spec is not None),
    Refusal(
        "--experimental-attention-variant, --hybrid-layer-pattern or --heterogeneous-layers-config-path",
        "The layer specifications of these models have no MaskMoE layers.",
        lambda args: bool(
            args.experimental_attention_variant or args.hybrid_layer_pattern or args.heterogeneous_layers_config_path
        ),
    ),
    Refusal(
        "--use-megatron-fsdp or --use-torch-fsdp2",
        "Fully sharded data parallelism has not been tried with a routing mask.",
        lambda args: args.use_megatron_fsdp or args.use_torch_fsdp2,
    ),
    Refusal(
        "--transformer-impl inference_optimized",
        "This implementation is for inference. Use local or transformer_engine.",
        lambda args: args.transformer_impl == "inference_optimized",
    ),
    _needs_transformer_engine("--multi-latent-attention", lambda args: args.multi_latent_attention),
    _needs_transformer_engine("--context-parallel-size above 1", lambda args: args.context_parallel_size > 1),
    _needs_transformer_engine("--moe-latent-size", lambda args: bool(args.moe_latent_size)),
    _needs_transformer_engine(
        "--recompute-modules layernorm, moe_act or mla_up_proj",
        lambda args: _recomputes(args, "layernorm", "moe_act", "mla_up_proj"),
    ),
    Refusal(
        "--tensor-model-parallel-size above 1 without --sequence-parallel",
        "Megatron-Core trains experts with tensor parallelism only if sequences are divided, too: pass "
        "--sequence-parallel. Evaluation and generation do without it.",
        lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel and not args.skip_train,
    ),
    Refusal(
        "--ckpt-format other than torch_dist",
        "Other checkpoint formats do not carry the routing mask.",
        lambda args: args.ckpt_format != "torch_dist",
    ),
)
"""Every refused setting, in the order in which training reports them."""


def check_supported(args: Namespace) -> None:
    """Refuse the first setting that does not work with masked routing.

    Raises:
        UserError: a setting is not supported; the message names the setting and the reason.
    """
    for error in unsupported_settings(args):
        raise UserError(error)


def unsupported_settings(args: Namespace) -> Iterator[str]:
    """Yield an error for every setting that does not work with masked routing.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    yield from (refusal.message for refusal in REFUSALS if refusal.applies(args))
    if args.num_experts:
        yield from _sizes_that_do_not_fit(args)


def _sizes_that_do_not_fit(args: Namespace) -> Iterator[str]:
    """Yield an error for every size that contradicts the number of experts."""
    num_experts, topk = args.num_experts, args.moe_router_topk
    if topk > num_experts:
        yield f"--moe-router-topk {topk} is more than --num-experts {num_experts}"
    if num_experts % args.expert_model_parallel_size:
        yield (
            f"--num-experts {num_experts} is not divisible by "
            f"--expert-model-parallel-size {args.expert_model_parallel_size}"
        )
    capacity = args.moe_expert_capacity_factor
    if capacity is not None and args.moe_pad_expert_input_to_capacity and capacity * topk > num_experts:
        yield (
            f"--moe-expert-capacity-factor {capacity} gives an expert room for more tokens than there are, and "
            f"--moe-pad-expert-input-to-capacity cannot fill this room; use at most {num_experts / topk:g}"
        )
    num_groups, group_topk = args.moe_router_num_groups, args.moe_router_group_topk
    if num_groups and group_topk and not group_topk <= topk <= group_topk * (num_experts // num_groups):
        yield (
            f"--moe-router-topk {topk} experts cannot be chosen from --moe-router-group-topk {group_topk} groups of "
            f"{num_experts // num_groups} experts with at least one from each group"
        )
