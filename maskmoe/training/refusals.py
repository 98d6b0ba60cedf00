"""Settings that training refuses because they do not work, or have no meaning, with masked routing."""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

from maskmoe.errors import UserError
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.transformer.dispatch.flex import missing_library


class Refusal(NamedTuple):
    """A setting of the command line that training does not support.

    Attributes:
        flag: the flags of the setting, with the refused values if other values are supported.
        reason: a sentence that says why the setting is not supported, and what to use instead if there is something.
        applies: returns whether parsed arguments have the setting.
    """

    flag: str
    reason: str
    applies: Callable[[Namespace], bool]


def _is_given(setting: str, args: Namespace) -> bool:
    """Return whether parsed arguments have a setting.

    Args:
        setting: `FLAG`, `FLAG VALUE`, `FLAG VALUE, VALUE or VALUE`, `FLAG above NUMBER` or `FLAG other than VALUE`; or
            several of them like `FLAG, FLAG or FLAG`, of which one is enough.
        args: the arguments.
    """
    first, *others = re.split("(?:, | or )(?=--)", setting)
    if others:
        return any(_is_given(alternative, args) for alternative in (first, *others))
    flag, *words = re.findall(r"[\w-]+", first)
    given = getattr(args, flag.removeprefix("--").replace("-", "_"))
    match words:
        case []:
            return given not in (None, False)
        case ["above", number]:
            return (given or 0) > int(number)
        case ["other", "than", value]:
            return given != value
    # A list of values also gives the word "or", which is the value of no flag.
    return not set(words).isdisjoint(given if isinstance(given, list) else [given])


def _flex_backend(args: Namespace) -> str | None:
    """Return the library that sends tokens for the flex dispatcher; None with another dispatcher."""
    if args.moe_token_dispatcher_type != "flex":
        return None
    return "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend


_ALWAYS_REFUSED = {
    "--moe-router-load-balancing-type sinkhorn": "Sinkhorn assigns an equal share of the tokens to every expert, which "
    "a routing mask rules out.",
    "--moe-router-load-balancing-type quantile_balancing": "Quantile balancing computes its bias from the logits of "
    "all experts, invisible experts included.",
    "--moe-router-fusion": "Transformer Engine's fused kernel ignores the routing mask. On GPUs, MaskMoE's own kernel "
    "routes without a flag.",
    "--moe-router-padding-for-quantization or --moe-router-padding-for-fp8": "The padding is for fp8 and fp4, which "
    "have not been tried.",
    "--moe-enable-routing-replay": "Replay repeats recorded choices and ignores the routing mask.",
    "--moe-routing-trace-path": "Megatron's trace leaves out every layer in which a token has fewer than k experts. "
    "Use maskmoe analyze.",
    "--moe-paged-stash, --moe-pad-experts-for-cuda-graph-inference, --moe-ncclep-static-shape or "
    "--moe-ncclep-zero-copy": "The setting is for fixed shapes, but the number of rows that a rank receives varies.",
    "--moe-mlp-glu-interleave-size or --moe-shared-expert-glu-interleave-size": "Conversion and evaluation do not know "
    "the interleaved order of the weights.",
    "--moe-single-grouped-weight or --moe-single-grouped-bias": "Conversion and resumption do not know the parameters "
    "of experts that are stored as one tensor.",
    "--overlap-moe-expert-parallel-comm, --delay-wgrad-compute or --ep-overlap-early-attn-memory-release": "The "
    "schedule of the overlap drops the token ids.",
    "--tensor-parallel-num-weight-shards or --expert-tensor-parallel-num-weight-shards": "Weights that are sharded and "
    "assembled for each product have not been tried with a routing mask.",
    "--mlp-chunks-for-training above 1": "Computing the MLP in chunks drops the token ids.",
    "--cuda-graph-impl other than none, --enable-cuda-graph or --external-cuda-graph": "A CUDA graph needs fixed "
    "shapes, but the number of rows that a rank sends varies.",
    "--moe-use-upcycling": "A dense checkpoint holds no routing mask. Convert the checkpoint with "
    "tools/convert_checkpoint.py upcycle.",
    "--sft or --dataloader-inter-document-masking": "Both pack sequences, and the bounds of packed sequences do not "
    "reach the later pipeline stages.",
    "--hybrid-context-parallel": "Hybrid context parallelism divides sequences in another way than the token ids are "
    "divided.",
    "--spec": "MaskMoE builds the layer specification itself.",
    "--yaml-cfg": "MaskMoE reads its settings from the command line. Use launch/pretrain.sh with a model file.",
    "--perform-rl-step": "MaskMoE has no reinforcement learning.",
    "--logits-save-dir or --logits-load-dir": "MaskMoE has no distillation from logits.",
    "--fim-data": "MaskMoE's datasets do not rearrange documents to fill in the middle.",
    "--dataloader-type external": "MaskMoE builds the data loader itself.",
    "--inprocess-restart": "MaskMoE restarts whole processes, as torchrun and Slurm do.",
    "--non-persistent-ckpt-type local or in_memory": "Only global checkpoints are verified and carry the routing mask.",
    "--experimental-attention-variant, --linear-attention-freq, --hybrid-layer-pattern, --hybrid-override-pattern, "
    "--mtp-hybrid-override-pattern, --is-hybrid-model, --heterogeneous-layers-config-path or "
    "--heterogeneous-layers-config-encoded-json": "The layer specifications of these models have no MaskMoE layers.",
    "--use-megatron-fsdp or --use-torch-fsdp2": "Fully sharded data parallelism has not been tried with a routing "
    "mask.",
    "--transformer-impl inference_optimized": "This implementation is for inference. Use local or transformer_engine.",
    "--ckpt-format other than torch_dist": "Other checkpoint formats do not carry the routing mask.",
}
"""The reasons against settings that are refused in every combination, in the form that `_is_given` reads."""

REFUSALS = (
    *(Refusal(flag, reason, partial(_is_given, flag)) for flag, reason in _ALWAYS_REFUSED.items()),
    Refusal(
        "--routing-mask without --num-experts",
        "A model without experts has nothing to route.",
        lambda args: args.routing_mask is not None and not args.num_experts,
    ),
    Refusal(
        "--moe-pad-expert-input-to-capacity with --moe-router-enable-expert-bias",
        "The bias would never move: it is updated from the padded load, which is equal for all experts.",
        lambda args: args.moe_pad_expert_input_to_capacity and args.moe_router_enable_expert_bias,
    ),
    Refusal(
        "--moe-token-dispatcher-type flex without --bf16",
        "DeepEP, HybridEP and NCCL-EP send bf16 only.",
        lambda args: _flex_backend(args) is not None and not args.bf16,
    ),
    Refusal(
        "--moe-token-dispatcher-type flex without --expert-model-parallel-size above 1",
        "DeepEP, HybridEP and NCCL-EP send tokens between expert-parallel ranks. Use alltoall or allgather.",
        lambda args: _flex_backend(args) is not None and args.expert_model_parallel_size == 1,
    ),
    Refusal(
        "--moe-token-dispatcher-type flex with --moe-pad-expert-input-to-capacity",
        "Padding selects more than k experts for some tokens, and DeepEP and NCCL-EP send k at most. Use alltoall or "
        "allgather.",
        lambda args: _flex_backend(args) is not None and args.moe_pad_expert_input_to_capacity,
    ),
    Refusal(
        "--moe-token-dispatcher-type flex with --use-transformer-engine-op-fuser",
        "The fuser pads the rows of each expert, which has not been tried with the libraries of this dispatcher.",
        lambda args: _flex_backend(args) is not None and args.use_transformer_engine_op_fuser,
    ),
    Refusal(
        "--moe-flex-dispatcher-backend ncclep without --moe-expert-rank-capacity-factor",
        "The factor sizes the buffer for the rows that a rank receives. The run aborts where a rank receives more than "
        "k times this factor for each of its own tokens.",
        lambda args: _flex_backend(args) == "ncclep" and args.moe_expert_rank_capacity_factor is None,
    ),
    Refusal(
        "--moe-expert-rank-capacity-factor without --moe-flex-dispatcher-backend ncclep",
        "Other dispatchers use the factor for CUDA graphs, which need fixed shapes, but the number of rows that a rank "
        "receives varies.",
        lambda args: args.moe_expert_rank_capacity_factor is not None and _flex_backend(args) != "ncclep",
    ),
    Refusal(
        "--fp8-format or --fp4-format",
        "fp8 and fp4 have not been tried with a routing mask. Use --bf16.",
        lambda args: bool(args.fp8 or args.fp4),
    ),
    Refusal(
        "--cross-entropy-loss-fusion without --bf16",
        "The fused loss rounds gradients to bf16.",
        lambda args: args.cross_entropy_loss_fusion and not args.bf16,
    ),
    Refusal(
        "--qk-layernorm-all-heads without --qk-layernorm and --normalization RMSNorm",
        "The flag changes the RMSNorms of --qk-layernorm, so it needs both.",
        lambda args: args.qk_layernorm_all_heads and not (args.qk_layernorm and args.normalization == "RMSNorm"),
    ),
    Refusal(
        "--tensor-model-parallel-size above 1 without --sequence-parallel",
        "Megatron-Core trains experts with tensor parallelism only if sequences are divided, too: pass "
        "--sequence-parallel. Evaluation and generation do without it.",
        lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel and not args.skip_train,
    ),
    Refusal(
        "--overlap-dispatch-backward-with-experts-wgrad with --overlap-grad-reduce or "
        "--no-gradient-accumulation-fusion",
        "Megatron-Core would reduce the experts' gradients before they are computed, or never read them.",
        lambda args: (
            args.overlap_dispatch_backward_with_experts_wgrad
            and (args.overlap_grad_reduce or not args.gradient_accumulation_fusion)
        ),
    ),
    Refusal(
        "--cp-comm-type other than p2p or all_gather with --transformer-impl local",
        "Local attention gathers keys and values: leave the flag out.",
        lambda args: (
            args.transformer_impl == "local"
            and args.context_parallel_size > 1
            and not {"p2p", "all_gather"}.issuperset(args.cp_comm_type)
        ),
    ),
)
"""Every refused setting, in the order in which training reports them."""

_NEED_TRANSFORMER_ENGINE = (
    *("--transformer-impl transformer_engine", "--moe-permute-fusion", "--use-precision-aware-optimizer"),
    *("--tp-comm-overlap", "--te-rng-tracker", "--use-transformer-engine-op-fuser", "--qk-clip"),
    "--log-max-attention-logit",
)


def check_supported(args: Namespace) -> None:
    """Refuse the first setting that does not work with masked routing or with the packages of this machine.

    Raises:
        UserError: a setting is not supported; the message names the setting and the reason.
    """
    packages = GpuPackages.installed()
    for error in chain(unsupported_settings(args), unavailable_settings(args, packages), missing_libraries(args)):
        raise UserError(error)


def unavailable_settings(args: Namespace, packages: GpuPackages) -> Iterator[str]:
    """Yield an error for every setting that needs a package that is missing.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        packages: the packages of the machines that train.
    """
    for setting in () if packages.transformer_engine else _NEED_TRANSFORMER_ENGINE:
        if _is_given(setting, args):
            yield f"{setting} needs Transformer Engine, which is not installed: install it, or leave the flag out"


def missing_libraries(args: Namespace) -> Iterator[str]:
    """Yield an error if the flex dispatcher needs a library that this machine lacks.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    backend = _flex_backend(args)
    if backend is not None and (library := missing_library(backend)):
        yield (
            f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {backend} needs {library}, which "
            "Megatron-Core cannot use on this machine. Install it, or use --moe-token-dispatcher-type alltoall."
        )


def unsupported_settings(args: Namespace) -> Iterator[str]:
    """Yield an error for every setting that does not work with masked routing.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    for refusal in REFUSALS:
        if refusal.applies(args):
            yield f"{refusal.flag} is not supported. {refusal.reason}"
    # The remaining errors are sizes that contradict the number of experts.
    if not args.num_experts:
        return
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
