"""Which settings of Megatron work beside a routing mask: never, not yet, and proven by a test; and what a run needs.

A run is refused only where it would be silently wrong, hang, or lose work. What Megatron-Core and MaskMoE's own classes
refuse themselves is not here. A run reports the flags that nobody has tried, see `note_on_unproven`.
"""

import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import megatron.core
import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from packaging.version import Version

from maskmoe.megatron_compat.gpu import LEAST_VERSION_OF_PERMUTATION, GpuPackages

Predicate = Callable[[Namespace], bool]

COLUMNS = ("cpu", "gpu")
"""The columns of `PROVEN`: where a run has trained with a flag."""


@dataclass(frozen=True)
class Refusal:
    """A setting with which no run starts.

    Attributes:
        flags: The flags, as a user writes them.
        reason: A sentence that says why, and what to use instead.
        predicate: Returns whether parsed arguments have the setting; Megatron need not have validated them. None if any
            of the flags is refused.
        issue: The report to Megatron-Core: an address, or a file of `docs/upstream`.
        fixed_in: The first version of Megatron-Core with which the setting is allowed.
    """

    flags: str
    reason: str
    predicate: Predicate | None = None
    issue: str = ""
    fixed_in: str = ""

    @property
    def is_active(self) -> bool:
        """Whether the installed Megatron-Core has the defect."""
        return not self.fixed_in or Version(megatron.core.__version__) < Version(self.fixed_in)

    def applies(self, args: Namespace) -> bool:
        """Return whether parsed arguments have the setting."""
        if self.predicate is not None:
            return self.predicate(args)
        names = (flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", self.flags))
        return any(getattr(args, name) not in (None, False) for name in names)


def refusals(args: Namespace) -> Iterator[str]:
    """Yield an error for every setting of parsed arguments that is refused."""
    for row in (*NEVER, *KNOWN_BUGS):
        if row.is_active and row.applies(args):
            yield f"{row.flags} is not supported. {row.reason}"


# ---- Predicates ------------------------------------------------------------------------------------------------------


def _has_layer(args: Namespace, symbol: str) -> bool:
    """Return whether the pattern of a hybrid model has a symbol."""
    return symbol in (args.hybrid_layer_pattern or "")


def _has_latent_attention(args: Namespace) -> bool:
    return args.multi_latent_attention or _has_layer(args, "+")


def _cuts_documents(args: Namespace) -> bool:
    """Return whether packed documents would be cut, or their bounds forgotten."""
    balances_samples = "seq_aux_loss" in args.moe_router_load_balancing_type and (args.micro_batch_size or 1) > 1
    changes_lengths = args.context_parallel_size > 1 or args.fim_data
    return args.dataloader_inter_document_masking and (changes_lengths or balances_samples)


def _pickles_scales(args: Namespace) -> bool:
    return bool(args.fp8 and args.fp8_recipe in ("delayed", "custom")) or bool(args.fp4 and args.fp4_recipe == "custom")


def _leaves_gradients_of_tensor_parallel_ranks(args: Namespace) -> bool:
    is_concerned = _has_latent_attention(args) or _has_layer(args, "G")
    return is_concerned and args.tensor_model_parallel_size > 1 and not (args.sequence_parallel or args.skip_train)


def _changes_activation(args: Namespace) -> bool:
    """Return whether a function that ignores a clamp or an offset would compute an activation that has one."""
    has_either = args.activation_func_clamp_value is not None or args.glu_linear_offset != 0
    fuses = args.use_transformer_engine_op_fuser
    uses_function = fuses or args.use_te_activation_func or args.moe_shared_expert_overlap
    return (uses_function and has_either) or (fuses and args.quick_geglu)


def _hides_prediction(args: Namespace) -> bool:
    """Return whether a layout puts multi-token prediction where Megatron-Core misses its copy of the embedding.

    Megatron-Core looks in the first chunk of the first pipeline rank, and in the last chunk of each other rank.
    """
    try:
        chunks = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout or "")
    except AssertionError:
        return False  # Megatron reports a layout that it cannot parse.
    searched = {0, *range(len(chunks) - args.pipeline_model_parallel_size + 1, len(chunks))}
    return any(LayerType.mtp in chunk and number not in searched for number, chunk in enumerate(chunks))


def _averages_predictions_by_rank(args: Namespace) -> bool:
    predicts = bool(args.mtp_num_layers) or _has_layer(args, "/")
    return predicts and args.context_parallel_size > 1 and not args.skip_train


def _ignores_reset_masks(args: Namespace) -> bool:
    if not args.reset_attention_mask or args.dataloader_inter_document_masking:
        return False
    return not args.create_attention_mask_in_dataloader or args.transformer_impl == "transformer_engine"


def _miscounts_growing_batches(args: Namespace) -> bool:
    counts_iterations = args.train_samples is None and not args.skip_train
    counts_wrongly = counts_iterations or args.phase_transition_iterations is not None
    return args.step_batch_size_schedule is not None and counts_wrongly


def _redraws_in_recomputation(args: Namespace) -> bool:
    """Return whether recomputation would not rewind random numbers that a layer draws.

    The states of the tracker's generators are handles, so a recomputed part continues where the forward pass ended.
    """
    if not args.te_rng_tracker:
        return False
    jitter, dropout = args.moe_input_jitter_eps, args.attention_dropout
    if args.recompute_granularity == "full":
        return bool(args.hidden_dropout or dropout or jitter)
    modules = args.recompute_modules or ("core_attn",)
    draws = ("core_attn" in modules and dropout) or ("moe" in modules and jitter)
    return bool(draws) and (args.recompute_activations or args.recompute_granularity == "selective")


def _reduces_gradients_twice(args: Namespace) -> bool:
    is_aligned = args.overlap_grad_reduce and args.align_grad_reduce and args.pipeline_model_parallel_size > 1
    return args.num_distributed_optimizer_instances > 1 and is_aligned


def _loses_state_of_optimizer(args: Namespace) -> bool:
    unscaled = {"fp32", "bf16", torch.float32, torch.bfloat16}  # before and after validation
    lacks_scales = bool(args.fp8) and not {args.exp_avg_dtype, args.exp_avg_sq_dtype} <= unscaled
    has_other_state = args.optimizer in ("sgd", "soap")
    return has_other_state or lacks_scales or args.optimizer_cpu_offload or args.optimizer_cuda_graph


def _joins_queries_and_keys(args: Namespace) -> bool:
    """Return whether a rank has a part of a query group, which Muon does not split into queries, keys and values."""
    has_parts = args.group_query_attention and args.num_query_groups < args.tensor_model_parallel_size
    return args.optimizer in ("muon", "dist_muon") and args.muon_split_qkv and has_parts


def _miscounts_gradients_of_experts(args: Namespace) -> bool:
    """Return whether shares of an optimizer mistake the ranks that hold the same or other parts of the experts."""
    shares_parameters = args.optimizer not in ("adam", "sgd") and (
        args.use_distributed_optimizer or args.optimizer == "dist_muon"
    )
    tp = args.tensor_model_parallel_size
    expert_tp = args.expert_tensor_parallel_size or tp
    has_other_ranks = args.add_bias_linear or tp > expert_tp * args.expert_model_parallel_size
    return shares_parameters and bool(args.num_experts) and expert_tp != tp and has_other_ranks


# ---- The rows --------------------------------------------------------------------------------------------------------

NEVER = (
    Refusal(
        "--routing-mask without --num-experts",
        "A model without experts has nothing to route.",
        lambda args: args.routing_mask is not None and not args.num_experts,
    ),
    Refusal(
        "--hybrid-layer-pattern with E without --num-experts, or without E with --num-experts",
        "The symbol E is for an MoE layer, and experts are in MoE layers only.",
        lambda args: args.hybrid_layer_pattern is not None and _has_layer(args, "E") != bool(args.num_experts),
    ),
    Refusal(
        "--spec, --experimental-attention-variant, --linear-attention-freq, --heterogeneous-layers-config-path or "
        "--heterogeneous-layers-config-encoded-json",
        "MaskMoE builds the layer specification itself, because Megatron-Core's MoE layers ignore the mask.",
    ),
    Refusal(
        "--cuda-graph-impl",
        "A graph of an MoE layer needs fixed shapes, but the number of rows that a rank sends to experts varies. A "
        "layer with a graph of its attention drops the token ids.",
        lambda args: args.cuda_graph_impl != "none",
    ),
    Refusal(
        "--fp8-recipe delayed, the default, or custom; or --fp4-recipe custom",
        "A checkpoint would hold the scales as a pickle with code, which MaskMoE does not read. Use tensorwise, "
        "blockwise or mxfp8.",
        _pickles_scales,
    ),
    Refusal(
        "--dataloader-inter-document-masking with --context-parallel-size above 1, --fim-data, or "
        "--moe-router-load-balancing-type seq_aux_loss and --micro-batch-size above 1",
        "These settings are for samples of one length, but documents have any length.",
        _cuts_documents,
    ),
    Refusal(
        "--ckpt-format other than torch_dist",
        "MaskMoE verifies the files of torch_dist checkpoints only, and reads the routing mask of a run from them.",
        lambda args: args.ckpt_format != "torch_dist",
    ),
    Refusal(
        "--async-strategy nvrx with --async-save",
        "MaskMoE's digests need the list of files that Megatron-Core's own strategy, the default, writes.",
        lambda args: args.async_save and args.async_strategy == "nvrx",
    ),
)
"""The settings that silently contradict a routing mask or MaskMoE's checkpoints."""

KNOWN_BUGS = (
    Refusal(
        "--moe-shared-expert-overlap, --use-transformer-engine-op-fuser or --use-te-activation-func with "
        "--activation-func-clamp-value or --glu-linear-offset; or the second with --quick-geglu",
        "Overlapped shared experts and Transformer Engine's functions ignore clamp and offset, or set them to 7 and 1.",
        _changes_activation,
        issue="https://github.com/NVIDIA/Megatron-LM/pull/5940",
    ),
    Refusal(
        "--tensor-model-parallel-size above 1 without --sequence-parallel, with latent attention or G in "
        "--hybrid-layer-pattern",
        "The weights that all ranks hold would get the gradients of one rank's heads only, and drift apart.",
        _leaves_gradients_of_tensor_parallel_ranks,
        issue="https://github.com/NVIDIA/Megatron-LM/pull/6839",
    ),
    Refusal(
        "--overlap-dispatch-backward-with-experts-wgrad",
        "The experts' gradients would be reduced before they are computed, or never be computed.",
        issue="docs/upstream/delayed-expert-gradients.md",
    ),
    Refusal(
        "latent attention without --no-rope-fusion",
        "Fused kernels read queries that they have rotated already, and can rotate those of the next token as well.",
        lambda args: args.apply_rope_fusion and _has_latent_attention(args),
        issue="https://github.com/NVIDIA/Megatron-LM/pull/5412",
    ),
    Refusal(
        "--pipeline-model-parallel-layout with m in a chunk that is neither the first nor a rank's last chunk",
        "The copy of the embedding for multi-token prediction would train apart from the embedding.",
        _hides_prediction,
        issue="docs/upstream/embedding-of-prediction.md",
    ),
    Refusal(
        "--context-parallel-size above 1 with multi-token prediction",
        "Each rank averages the loss of predicted tokens over its own tokens, and ranks have different numbers.",
        _averages_predictions_by_rank,
        issue="https://github.com/NVIDIA/Megatron-LM/pull/7498",
    ),
    Refusal(
        "--fp16 with --num-experts and without --loss-scale",
        "The optimizers of the experts and of the other parameters adapt a loss scale each, but the loss has one. So "
        "after an overflow, gradients are wrong by a power of two. Use --bf16.",
        lambda args: args.fp16 and bool(args.num_experts) and args.loss_scale is None and not args.skip_train,
        issue="docs/upstream/loss-scale-of-experts.md",
    ),
    Refusal(
        "--reset-attention-mask with --no-create-attention-mask-in-dataloader or --transformer-impl transformer_engine",
        "Tokens would attend to other documents. Use --dataloader-inter-document-masking, which needs no mask.",
        _ignores_reset_masks,
        issue="https://github.com/NVIDIA/Megatron-LM/issues/2357",
    ),
    Refusal(
        "--step-batch-size-schedule without --train-samples, or with --phase-transition-iterations",
        "Megatron-Core counts as if all batches had one size.",
        _miscounts_growing_batches,
        issue="docs/upstream/step-batch-size-schedule.md",
    ),
    Refusal(
        "--optimizer sgd or soap, --optimizer-cpu-offload, --optimizer-cuda-graph, or --fp8-format with "
        "--exp-avg-dtype or --exp-avg-sq-dtype fp16 or fp8",
        "Checkpoints would lack a part of the optimizer's state, or could not be saved or loaded. Use adam or muon.",
        _loses_state_of_optimizer,
        issue="docs/upstream/optimizers-that-do-not-resume.md",
    ),
    Refusal(
        "--te-rng-tracker, with dropout or --moe-input-jitter-eps in parts that are recomputed",
        "The backward pass would draw other random numbers than the forward pass.",
        _redraws_in_recomputation,
        issue="https://github.com/NVIDIA/Megatron-LM/pull/5841",
    ),
    Refusal(
        "--num-distributed-optimizer-instances above 1 with --overlap-grad-reduce and pipeline parallelism, without "
        "--no-align-grad-reduce",
        "The gradients of all stages but the first would be scaled and reduced twice.",
        _reduces_gradients_twice,
        issue="docs/upstream/aligned-grad-reduce.md",
    ),
    Refusal(
        "--optimizer muon with --num-query-groups below --tensor-model-parallel-size, without --muon-no-split-qkv",
        "Queries, keys and values of a rank would be orthogonalized together.",
        _joins_queries_and_keys,
        issue="https://github.com/NVIDIA/Megatron-LM/pull/6326",
    ),
    Refusal(
        "--optimizer muon or lion with --use-distributed-optimizer and another --expert-tensor-parallel-size than "
        "--tensor-model-parallel-size, with biases or fewer ranks for all experts than --tensor-model-parallel-size",
        "The gradient norm would count gradients of experts several times, or some of them never.",
        _miscounts_gradients_of_experts,
        issue="https://github.com/NVIDIA/Megatron-LM/pull/6099",
    ),
    Refusal(
        "--non-persistent-save-interval, --non-persistent-ckpt-type or --non-persistent-global-ckpt-dir",
        "A damaged non-persistent checkpoint is trusted, so that a run may restart for ever. Use a smaller "
        "--save-interval and --keep-last-checkpoints.",
        issue="https://github.com/NVIDIA/Megatron-LM/issues/5281",
    ),
    Refusal(
        "--use-megatron-fsdp or --use-torch-fsdp2",
        "Megatron-FSDP scales gradients of experts wrongly, and FSDP2 excludes expert parallelism. Use "
        "--use-distributed-optimizer.",
        issue="https://github.com/NVIDIA/Megatron-LM/issues/6660",
    ),
    Refusal(
        "--fine-grained-activation-offloading",
        "The first step after every start reads activations that may not have reached the host yet. Use recomputation.",
        issue="https://github.com/NVIDIA/Megatron-LM/issues/7398",
    ),
    Refusal(
        "--qk-clip",
        "The clip writes NaN into weights if a group's largest score is negative. Use --qk-layernorm.",
        issue="https://github.com/NVIDIA/Megatron-LM/pull/7517",
    ),
    Refusal(
        "--init-model-with-meta-device",
        "A run from random weights would start with whatever the memory holds. Leave the flag out.",
        issue="docs/upstream/meta-device.md",
    ),
)
"""The settings with which Megatron-Core is silently wrong, hangs or loses work."""


# ---- What a run needs ------------------------------------------------------------------------------------------------

_GROUPED_GEMM = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"


def missing_flags(args: Namespace, has_checkpoint: bool) -> Iterator[str]:
    """Yield an error for each missing flag that Megatron reports late, or by another name."""
    if not (args.perform_initialization or has_checkpoint):
        yield "no initial weights: leave --no-initialization out, because no checkpoint is loaded"
    if args.seq_length is None and args.encoder_seq_length is None:
        settings = ", or --use-checkpoint-args for the settings of the checkpoint" if has_checkpoint else ""
        yield f"no sequence length: pass --seq-length{settings}"
    is_evaluation = hasattr(args, "eval_split")
    if not is_evaluation and args.train_iters is None and args.train_samples is None:
        yield "no length of training: pass --train-iters or --train-samples"
    if args.lr is None and not args.skip_train:
        yield "no learning rate: pass --lr"


def missing_transformer_engine(args: Namespace, packages: GpuPackages) -> Iterator[str]:
    """Yield an error if recomputation needs Transformer Engine, but the machines that train lack it."""
    recomputed = {"layernorm", "moe_act", "mla_up_proj"}.intersection(args.recompute_modules or ())
    if recomputed and args.recompute_granularity == "selective" and not packages.transformer_engine:
        yield f"--recompute-modules {' '.join(sorted(recomputed))} needs Transformer Engine, which is not installed"


def note_on_flex(args: Namespace, gpus_of_node: int, has_deep_ep: bool) -> str | None:
    """Recommend flex dispatch if the ranks that share experts are on several nodes, and DeepEP is installed."""
    num_ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
    is_alltoall = args.bf16 and args.moe_token_dispatcher_type == "alltoall"
    if not (has_deep_ep and is_alltoall and num_ranks > gpus_of_node):
        return None
    return (
        f"{num_ranks} ranks share the experts, and a node has {gpus_of_node}: pass --moe-token-dispatcher-type flex, "
        "with which DeepEP sends one copy of a token to each node instead of to each rank"
    )


def outdated_packages(args: Namespace) -> Iterator[str]:
    """Yield an error for each package whose version on this machine silently computes something else."""
    has_learnable_softmax = args.softmax_type == "learnable" and args.transformer_impl == "transformer_engine"
    # A grouped product of no rows leaves the gradients of the weights unwritten.
    is_grouped = args.moe_grouped_gemm and os.environ.get(_GROUPED_GEMM, "0") != "0"
    loses_gradients = is_grouped and not args.gradient_accumulation_fusion
    for applies, flags, package, least in (
        (_has_layer(args, "G"), "--hybrid-layer-pattern with G", "flash-linear-attention", "0.5.2"),
        (has_learnable_softmax, "--softmax-type learnable", "transformer-engine", "2.14"),
        (loses_gradients, f"{_GROUPED_GEMM}=1 with --no-gradient-accumulation-fusion", "transformer-engine", "2.19"),
        (args.moe_permute_fusion, "--moe-permute-fusion", "transformer-engine", LEAST_VERSION_OF_PERMUTATION),
    ):
        with suppress(PackageNotFoundError):
            if applies and Version(found := version(package)) < Version(least):
                yield f"{flags} needs {package} {least} or newer, because {found} computes something else: install it"


# ---- What a test has trained with ------------------------------------------------------------------------------------


@cache
def proven() -> dict[str, frozenset[str]]:
    """Return the flags that a run has trained with beside a routing mask, by column.

    `docs/generators/proven.py` writes the file from the runs of the tests and of the campaign on GPUs.
    """
    lines = files("maskmoe.training.settings").joinpath("proven.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.partition("\t")[::2] for line in lines]
    return {column: frozenset(flag for flag, where in rows if column in where.split()) for column in COLUMNS}


def flags_of(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return the parser's flags in a command line as `proven` has them: with the value if a flag has few values."""
    flags, action = [], None
    for word in words:
        flag, _, value = word.partition("=")
        is_flag = flag.startswith("--")
        action = parser._option_string_actions.get(flag) if is_flag else action
        if action is None:
            continue
        if not action.choices:
            flags += [flag] if is_flag else []
        elif value or not is_flag:
            flags.append(f"{action.option_strings[0]} {value or word}")
    return list(dict.fromkeys(flags))


def note_on_unproven(flags: Collection[str], column: str) -> str | None:
    """Return the note of a run whose flags nobody has tried with a routing mask where the run is; None if all are."""
    unproven = [flag for flag in flags if flag not in proven()[column]]
    if not unproven:
        return None
    where = {"cpu": "", "gpu": " on GPUs"}[column]
    which = ", ".join(unproven) if proven()[column] else "all flags"
    return f"not tried with a routing mask{where}: {which}"
