"""Settings that training refuses because they do not work, or have no meaning, with masked routing."""

import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import NamedTuple

import torch
from megatron.core.optimizer.emerging_optimizers import HAVE_EMERGING_OPTIMIZERS
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from maskmoe.errors import UserError
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.training.settings.arguments import may_change_mask
from maskmoe.transformer.dispatch.flex import missing_library
from maskmoe.transformer.torch_modules.gated_delta_net import check_gated_delta_net, uses_fla


class Refusal(NamedTuple):
    """A setting of the command line that training does not support.

    Attributes:
        flag: the flags of the setting, with the refused values if other values are supported.
        reason: a sentence that says why the setting is not supported, and what to use instead if there is something.
        applies: returns whether parsed arguments have the setting.
        remedy: returns what to do instead, with the values of parsed arguments, if the reason does not say it.
    """

    flag: str
    reason: str
    applies: Callable[[Namespace], bool]
    remedy: Callable[[Namespace], str] | None = None


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
    name = flag.removeprefix("--").replace("-", "_")
    if not hasattr(args, name):  # the installed Megatron-Core does not have the flag
        return False
    given = getattr(args, name)
    match words:
        case []:
            return given not in (None, False)
        case ["above", number]:
            return (given or 0) > int(number)
        case ["other", "than", value]:
            return given != value
    # A list of values also gives the word "or", which is the value of no flag.
    return not set(words).isdisjoint(given if isinstance(given, list) else [given])


def _captured_moe_parts(args: Namespace) -> str:
    """Name what Transformer Engine's CUDA graphs would capture of MoE layers; empty if they capture nothing of them."""
    if args.cuda_graph_impl != "transformer_engine" and not getattr(args, "external_cuda_graph", False):
        return ""
    modules = args.cuda_graph_modules or getattr(args, "cuda_graph_scope_deprecated", None) or []
    names = [getattr(module, "name", str(module)) for module in modules]
    if not names or "full" in names:
        return "whole layers, because no modules are named"
    return ", ".join(name for name in names if name not in ("attn", "mlp"))


def _upcycling_command(args: Namespace) -> str:
    """Return the command that does what Megatron's upcycling would do with these arguments."""
    words = ["maskmoe", "convert", "upcycle", "--load", args.load or "DENSE_CHECKPOINT"]
    words += ["--save", args.save or "MOE_CHECKPOINT", "--routing-mask", args.routing_mask or "MASK"]
    words += ["--num-experts", args.num_experts or "N", "--topk", args.moe_router_topk]
    words += ["--moe-layer-freq", str(args.moe_layer_freq).replace(" ", "")] if args.moe_layer_freq != 1 else []
    words += ["--granularity", args.moe_upcycling_granularity] if args.moe_upcycling_granularity != 1 else []
    words += ["--shared-expert"] if args.moe_shared_expert_intermediate_size else []
    return f"The command is: {shlex.join(map(str, words))}"


def _divides_matrices(args: Namespace) -> bool:
    """Return whether an optimizer like Muon updates each matrix on one data-parallel rank only."""
    is_divided = args.use_distributed_optimizer or getattr(args, "use_layer_wise_distributed_optimizer", False)
    return args.optimizer == "dist_muon" or (args.optimizer not in ("adam", "sgd") and is_divided)


def _pattern_has(symbol: str, args: Namespace) -> bool:
    """Return whether the pattern of a hybrid model has a symbol."""
    return symbol in (args.hybrid_layer_pattern or "")


def _hides_prediction(args: Namespace) -> bool:
    """Return whether a layout puts multi-token prediction where Megatron-Core misses its copy of the embedding.

    Megatron-Core looks for copies in the first chunk of the first pipeline rank, and in the last chunk of each other
    rank.
    """
    try:
        chunks = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout or "")
    except AssertionError:
        return False  # Megatron reports a layout that it cannot parse.
    searched = {0, *range(len(chunks) - args.pipeline_model_parallel_size + 1, len(chunks))}
    return any(LayerType.mtp in chunk and number not in searched for number, chunk in enumerate(chunks))


def _flex_backend(args: Namespace) -> str | None:
    """Return the library that sends tokens for the flex dispatcher; None with another dispatcher."""
    if args.moe_token_dispatcher_type != "flex":
        return None
    return "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend


_ALWAYS_REFUSED = {
    "--moe-router-load-balancing-type sinkhorn": "Sinkhorn assigns an equal share of the tokens to every expert, "
    "which a routing mask rules out.",
    "--moe-router-load-balancing-type quantile_balancing": "Quantile balancing computes its bias from the logits of "
    "all experts, invisible experts included.",
    "--moe-router-fusion": "Transformer Engine's fused kernel ignores the routing mask. On GPUs, MaskMoE's own kernel "
    "routes without a flag.",
    "--moe-router-padding-for-quantization or --moe-router-padding-for-fp8": "The padding sends tokens to experts "
    "that the routing mask hides, with weight 0. It is for fp8 and fp4.",
    "--moe-routing-trace-path": "Megatron's trace leaves out every layer in which a token has fewer than k experts. "
    "Use maskmoe analyze.",
    "--moe-paged-stash, --moe-pad-experts-for-cuda-graph-inference, --moe-ncclep-static-shape or "
    "--moe-ncclep-zero-copy": "The setting is for fixed shapes, but the number of rows that a rank receives varies.",
    "--moe-mlp-glu-interleave-size or --moe-shared-expert-glu-interleave-size": "The order of the weights is for "
    "kernels of Transformer Engine. MaskMoE's conversion and its transformers model read the order of Megatron-Core's "
    "defaults.",
    "--moe-single-grouped-weight or --moe-single-grouped-bias": "All experts of a rank become one parameter, which "
    "only Transformer Engine's operation fuser can train, and only on GPUs. MaskMoE's conversion reads one parameter "
    "for each expert.",
    "--overlap-moe-expert-parallel-comm, --delay-wgrad-compute or --ep-overlap-early-attn-memory-release": "The "
    "schedule of the overlap runs the steps of an MoE layer one by one, and calls the router without padding_mask, on "
    "which the token ids travel. MaskMoE's dispatchers choose experts and send tokens in one step.",
    "--tensor-parallel-num-weight-shards or --expert-tensor-parallel-num-weight-shards": "Transformer Engine's linear "
    "layers pad a weight before they divide it into shards. Checkpoints then hold padded weights, which MaskMoE's "
    "conversion cannot tell from the weights of a larger model. Use --use-distributed-optimizer to save memory.",
    "--mlp-chunks-for-training above 1": "Megatron-Core routes each chunk of a sequence by itself and adds up the "
    "losses of the chunks, so the load-balancing losses and the z-loss weigh as many times as there are chunks. To "
    "save memory, use --recompute-granularity selective --recompute-modules moe.",
    "--cuda-graph-impl local or full_iteration, or --enable-cuda-graph": "These graphs capture transformer layers "
    "with their MoE layers, also with --cuda-graph-modules attn. A CUDA graph needs fixed shapes, but the number of "
    "rows that a rank sends to experts varies. Use --cuda-graph-impl transformer_engine --cuda-graph-modules attn.",
    "--cache-mla-latents": "Megatron-Core's training forbids the cache, and evaluation and generation keep no cache.",
    "--position-embedding-type mrope": "The embedding needs three positions for each token, of time, height and width, "
    "but a token of a text has one position. Use rope.",
    "--freeze-all-layers": "Megatron-Core does not freeze a model that MaskMoE builds, and would train it. To compute "
    "losses without training, use maskmoe evaluate.",
    "--sft": "Megatron-Core's dataset fills up each sample with one id, and does not report these tokens as padding. "
    "The routing mask sends all of them to the few experts that the id sees. Tokenize the conversations first, and "
    "use --dataloader-inter-document-masking, which packs them without padding.",
    "--hybrid-context-parallel": "Ranks run different numbers of micro-batches, as the lengths of their samples "
    "require. Expert-parallel ranks would wait for each other forever, because they exchange tokens in every "
    "micro-batch. Use --context-parallel-size.",
    "--spec": "MaskMoE builds the layer specification itself, because Megatron-Core's MoE layers ignore the mask.",
    "--rampup-batch-size": "Megatron-Core 0.19 ignores the flag, and all batches would have the full size. Use "
    "--step-batch-size-schedule.",
    "--yaml-cfg": "Megatron-Core replaces all arguments by the content of the file, those of MaskMoE included, and "
    "leaves out its checks. Use launch/pretrain.sh with a model file.",
    "--perform-rl-step": "The Python package megatron-core 0.19 lacks megatron.rl, on which the flag depends.",
    "--logits-save-dir or --logits-load-dir": "Megatron-Core leaves the loss of a student to the training script, "
    "and MaskMoE's loss has no teacher. Saving fails on all pipeline stages but the last, which lack an output layer.",
    "--dataloader-type external": "Megatron-Core takes an external data loader from the program that calls it. This "
    "program is MaskMoE, which has no data loader of its own.",
    "--inprocess-restart": "Megatron-Core restarts training within the processes of the failed run. MaskMoE ends the "
    "processes of a run that hangs, because the stack of a hanging rank cannot be unwound. Use --max-restarts of "
    "torchrun, or Slurm.",
    "--non-persistent-ckpt-type local or in_memory": "A local checkpoint is a pickle of nvidia-resiliency-ext for each "
    "rank: loading it may run code, MaskMoE can neither verify it nor read the routing mask from it, and only the same "
    "layout can resume from it. Megatron-Core does not implement in_memory. Use global, with "
    "--non-persistent-global-ckpt-dir on a fast file system that all nodes share.",
    "--hybrid-override-pattern, --mtp-hybrid-override-pattern or --is-hybrid-model": "Megatron-Core keeps these flags "
    "for old checkpoints. Use --hybrid-layer-pattern.",
    "--experimental-attention-variant, --linear-attention-freq, --heterogeneous-layers-config-path or "
    "--heterogeneous-layers-config-encoded-json": "The layer specifications of these models have no MaskMoE layers.",
    "--use-megatron-fsdp": "If each expert is on one rank only, Megatron-Core 0.19 divides its accumulated gradient by "
    "the number of ranks after every micro-batch. Saving hangs, because all ranks must describe each optimizer state "
    "together, but a rank has none for a parameter of which it holds no part. MaskMoE does not verify checkpoints of "
    "the format fsdp_dtensor. Use --use-distributed-optimizer.",
    "--use-torch-fsdp2": "Megatron-Core excludes expert parallelism, pipelines and its distributed optimizer with it. "
    "Use --use-distributed-optimizer.",
    "--optimizer soap": "SOAP keeps square matrices for each parameter, but Megatron-Core's checkpoints hold only "
    "states in the shape of their parameter. Use muon.",
    "--optimizer adaptive_muon": "Megatron-Core's class lacks the attribute scale_mode, which the step of "
    "emerging-optimizers 0.3 reads. Use muon.",
    "--transformer-impl inference_optimized": "Its router ignores the routing mask and cannot train. Use local or "
    "transformer_engine.",
    "--ckpt-format other than torch_dist": "MaskMoE verifies the files of torch_dist checkpoints only, and reads the "
    "routing mask of a run from them. torch stores pickles for each rank; torch_dcp and fsdp_dtensor are for fully "
    "sharded data parallelism.",
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
        "--hybrid-layer-pattern with D",
        "The symbol is for sparse attention, which Megatron-Core calls experimental and builds of Transformer Engine's "
        "modules only; MaskMoE's layer specification has no such layer. Use +.",
        partial(_pattern_has, "D"),
    ),
    Refusal(
        "--hybrid-layer-pattern with E without --num-experts",
        "The symbol E is for a MoE layer.",
        lambda args: _pattern_has("E", args) and not args.num_experts,
    ),
    Refusal(
        "--hybrid-layer-pattern without E with --num-experts",
        "The symbol E is for a MoE layer, and experts are in MoE layers only.",
        lambda args: args.hybrid_layer_pattern is not None and not _pattern_has("E", args) and bool(args.num_experts),
    ),
    Refusal(
        "--hybrid-layer-pattern with * with --multi-latent-attention",
        "Latent attention is the symbol +.",
        lambda args: _pattern_has("*", args) and args.multi_latent_attention,
    ),
    Refusal(
        "--hybrid-layer-pattern without / with --mtp-num-layers",
        "Multi-token prediction is a part of the pattern: append /*E for each predicted token.",
        lambda args: args.hybrid_layer_pattern is not None and not _pattern_has("/", args) and args.mtp_num_layers,
    ),
    Refusal(
        "--non-persistent-save-interval or --non-persistent-global-ckpt-dir, without --non-persistent-ckpt-type",
        "Megatron-Core ends at the first save without a type, and ignores the folder. Pass --non-persistent-ckpt-type "
        "global.",
        lambda args: (
            args.non_persistent_ckpt_type is None
            and _is_given("--non-persistent-save-interval or --non-persistent-global-ckpt-dir", args)
        ),
    ),
    Refusal(
        "--step-batch-size-schedule without --train-samples",
        "Megatron-Core converts --train-iters into samples, for the data and for the learning rate, by the size of one "
        "micro-batch on each data-parallel rank.",
        lambda args: args.step_batch_size_schedule is not None and args.train_samples is None and not args.skip_train,
    ),
    Refusal(
        "--step-batch-size-schedule with --override-ckpt-iteration, --phase-transition-iterations or "
        "--decrease-batch-size-if-needed",
        "Megatron-Core computes the samples of these flags as if all batches had one size.",
        lambda args: (
            args.step_batch_size_schedule is not None
            and _is_given(
                "--override-ckpt-iteration, --phase-transition-iterations or --decrease-batch-size-if-needed", args
            )
        ),
    ),
    Refusal(
        "--step-batch-size-schedule with --pipeline-model-parallel-size above 1 and --cuda-graph-impl "
        "transformer_engine",
        "The graphs of a pipeline stage are for one number of micro-batches.",
        lambda args: (
            args.step_batch_size_schedule is not None
            and args.pipeline_model_parallel_size > 1
            and _is_given("--cuda-graph-impl transformer_engine or --external-cuda-graph", args)
        ),
    ),
    Refusal(
        "--full-validation without --multiple-validation-sets",
        "Megatron-Core fails at the first validation, because it expects the numbers of batches of several sets. Pass "
        "both flags, also for one set.",
        lambda args: args.full_validation and not args.multiple_validation_sets,
    ),
    Refusal(
        "--full-validation with --tensor-model-parallel-size or --pipeline-model-parallel-size above 1, without "
        "--eval-micro-batch-size 1",
        "Megatron-Core reads micro-batches of one sample, but the other ranks of a tensor-parallel or pipeline group "
        "expect micro-batches of the given size.",
        lambda args: (
            args.full_validation
            and max(args.tensor_model_parallel_size, args.pipeline_model_parallel_size) > 1
            and (args.eval_micro_batch_size or args.micro_batch_size) != 1
        ),
    ),
    Refusal(
        "--change-routing-mask without --routing-mask",
        "Without a mask in --routing-mask, a run uses the mask of the checkpoint.",
        lambda args: may_change_mask(args) and args.routing_mask is None,
    ),
    Refusal(
        "--spike-action skip with --qk-clip or --optimizer-cuda-graph",
        "Megatron-Core scales the weights of queries and keys after each step, also after a step without an update. A "
        "CUDA graph of the optimizer updates the weights without asking the host.",
        lambda args: (
            getattr(args, "spike_action", None) == "skip" and _is_given("--qk-clip or --optimizer-cuda-graph", args)
        ),
    ),
    Refusal(
        "--cuda-graph-impl transformer_engine without --cuda-graph-modules attn or mlp",
        "Graphs of attention and of dense MLPs are supported. A graph of an MoE layer, or of its router, needs fixed "
        "shapes, but the number of rows that a rank sends to experts varies.",
        lambda args: bool(_captured_moe_parts(args)),
        lambda args: f"The given flags capture {_captured_moe_parts(args)}. Pass --cuda-graph-modules attn.",
    ),
    Refusal(
        "--moe-use-upcycling",
        "A dense checkpoint holds no routing mask. MaskMoE makes experts of its MLPs before training.",
        partial(_is_given, "--moe-use-upcycling"),
        _upcycling_command,
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
        "--moe-flex-dispatcher-backend ncclep with --use-transformer-engine-op-fuser",
        "With the fuser, NCCL-EP pads the rows of each expert to multiples of 256. It sets these rows to 0, but "
        "promises nothing about their weights: a weight that is NaN would make the expert's gradients NaN. Use deepep "
        "or hybridep, which do not pad in bf16.",
        lambda args: _flex_backend(args) == "ncclep" and args.use_transformer_engine_op_fuser,
    ),
    Refusal(
        "--moe-flex-dispatcher-backend ncclep without --moe-expert-rank-capacity-factor",
        "The factor sizes the buffer for the rows that a rank receives. The run aborts where a rank receives more than "
        "k times this factor for each of its own tokens.",
        lambda args: _flex_backend(args) == "ncclep" and args.moe_expert_rank_capacity_factor is None,
    ),
    Refusal(
        "--moe-expert-rank-capacity-factor without --moe-flex-dispatcher-backend ncclep",
        "HybridEP would drop the tokens beyond the factor, and needs no factor. Other dispatchers do not read it.",
        lambda args: args.moe_expert_rank_capacity_factor is not None and _flex_backend(args) != "ncclep",
    ),
    Refusal(
        "--dataloader-inter-document-masking with --context-parallel-size above 1",
        "Context parallelism would cut each document into equal parts for the ranks, but documents have any length.",
        lambda args: args.dataloader_inter_document_masking and args.context_parallel_size > 1,
    ),
    Refusal(
        "--dataloader-inter-document-masking with --cuda-graph-impl other than none, or with --external-cuda-graph",
        "A graph repeats the bounds of the documents with which it was captured.",
        lambda args: (
            args.dataloader_inter_document_masking
            and _is_given("--cuda-graph-impl other than none or --external-cuda-graph", args)
        ),
    ),
    Refusal(
        "--dataloader-inter-document-masking with --micro-batch-size above 1 and --moe-router-load-balancing-type "
        "seq_aux_loss",
        "Megatron-Core joins the samples of a micro-batch to one sequence, whose samples the loss could not balance "
        "one by one. Use --micro-batch-size 1.",
        lambda args: (
            args.dataloader_inter_document_masking
            and (args.micro_batch_size or 1) > 1
            and _is_given("--moe-router-load-balancing-type seq_aux_loss", args)
        ),
    ),
    Refusal(
        "--fim-data without --tokenizer-type HuggingFaceTokenizer",
        "Megatron-Core's dataset turns ids into text without special tokens, which the other tokenizers of MaskMoE's "
        "tools cannot do.",
        lambda args: args.fim_data and args.tokenizer_type != "HuggingFaceTokenizer",
    ),
    Refusal(
        "--fim-data with --dataloader-inter-document-masking",
        "Megatron-Core's dataset moves the bounds of documents and does not report them.",
        lambda args: args.fim_data and args.dataloader_inter_document_masking,
    ),
    Refusal(
        "--reset-attention-mask with --no-create-attention-mask-in-dataloader",
        "Without the data loader's mask, tokens attend to other documents. Leave the second flag out, or use "
        "--dataloader-inter-document-masking, which needs no mask.",
        lambda args: (
            args.reset_attention_mask
            and not args.create_attention_mask_in_dataloader
            and not args.dataloader_inter_document_masking
        ),
    ),
    Refusal(
        "--reset-attention-mask with --transformer-impl transformer_engine",
        "Transformer Engine ignores the data loader's mask (Megatron-LM issue 2357). Use "
        "--dataloader-inter-document-masking.",
        lambda args: (
            args.reset_attention_mask
            and args.transformer_impl == "transformer_engine"
            and not args.dataloader_inter_document_masking
        ),
    ),
    Refusal(
        "--fp8-format or --fp4-format",
        "Megatron-Core recomputes layers in fp8 and fp4 by Transformer Engine's checkpointing, which knows the scales "
        "of the forward pass. MaskMoE recomputes its MoE layers by torch's checkpointing, which does not. Use --bf16.",
        lambda args: bool(args.fp8 or args.fp4),
    ),
    Refusal(
        "--use-distributed-optimizer with --optimizer muon or lion, without --bf16",
        "Megatron-Core divides the matrices among data-parallel ranks in bf16 training only: in fp32, its "
        "LayerWiseDistributedOptimizer leaves the optimizers without a loss scale.",
        lambda args: _divides_matrices(args) and not args.bf16,
    ),
    Refusal(
        "--use-distributed-optimizer with --optimizer muon or lion, without --disable-bias-linear",
        "Megatron-Core has no distributed optimizer for the biases of experts beside one that divides matrices. "
        "--no-use-layer-wise-param-layout does without it.",
        lambda args: _divides_matrices(args) and args.add_bias_linear and args.use_layer_wise_param_layout,
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
        "--moe-latent-size with --moe-shared-expert-overlap",
        "Megatron-Core's overlap gives shared experts the rows of the routed experts, which are narrower.",
        lambda args: args.moe_latent_size is not None and args.moe_shared_expert_overlap,
    ),
    Refusal(
        "--moe-shared-expert-intermediate-size without --disable-bias-linear",
        "Megatron-Core's shared experts have no biases.",
        lambda args: bool(args.moe_shared_expert_intermediate_size) and args.add_bias_linear,
    ),
    Refusal(
        "--expert-tensor-parallel-size above 1 without --disable-bias-linear",
        "Each of the ranks that share an expert would add the bias of the expert. The size is "
        "--tensor-model-parallel-size by default: pass --expert-tensor-parallel-size 1 to keep the biases.",
        lambda args: (
            bool(args.num_experts)
            and (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) > 1
            and args.add_bias_linear
        ),
    ),
    Refusal(
        "--pipeline-model-parallel-layout with m in a chunk that is neither the first nor a rank's last chunk",
        "Multi-token prediction has a copy of the embedding. Megatron-Core looks for copies only in the first chunk of "
        "the first pipeline rank, and in the last chunks of the other ranks. Put m into one of these chunks.",
        _hides_prediction,
    ),
    Refusal(
        "--save-tokens-per-expert-interval with --transformer-impl local, without --moe-grouped-gemm, or with "
        "--use-transformer-engine-op-fuser",
        "Megatron-Core counts the rows of Transformer Engine's grouped linear layers, and would write nothing.",
        lambda args: (
            _is_given("--save-tokens-per-expert-interval", args)
            and (
                _is_given("--transformer-impl local or --use-transformer-engine-op-fuser", args)
                or not args.moe_grouped_gemm
            )
        ),
    ),
    Refusal(
        "--mla-down-proj-fusion with --transformer-impl local",
        "The local modules compress queries and keys by separate projections: leave the flag out.",
        lambda args: args.transformer_impl == "local" and args.mla_down_proj_fusion,
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
    *("--cuda-graph-impl transformer_engine", "--external-cuda-graph"),
    *("--tp-comm-overlap", "--te-rng-tracker", "--use-transformer-engine-op-fuser", "--qk-clip"),
    "--log-max-attention-logit",
)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    if packages.transformer_engine and not packages.permutation and args.moe_permute_fusion:
        yield (
            "--moe-permute-fusion needs Transformer Engine 2.6 or newer, but the installed version is older: install a "
            "newer version, or leave the flag out"
        )


def missing_libraries(args: Namespace) -> Iterator[str]:
    """Yield an error if the optimizer, a layer or the flex dispatcher needs a library that this machine lacks.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    if args.optimizer not in ("adam", "sgd") and not HAVE_EMERGING_OPTIMIZERS:
        yield (
            f"--optimizer {args.optimizer} needs the Python package emerging-optimizers, which is not installed: "
            "pip install 'maskmoe[muon]', or launch/setup.sh --extras muon"
        )
    if _pattern_has("M", args) and find_spec("mamba_ssm") is None:
        yield (
            "--hybrid-layer-pattern with M needs the Python package mamba-ssm, which is not installed and needs a GPU: "
            "install it, or use G, which plain torch can compute"
        )
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
            remedy = f" {refusal.remedy(args)}" if refusal.remedy else ""
            yield f"{refusal.flag} is not supported. {refusal.reason}{remedy}"
    if refusal := check_gated_delta_net(args, uses_fla()):
        yield refusal
    if not args.num_experts:
        return
    yield from _errors_of_jitter(args)
    # The remaining errors are sizes that contradict the number of experts.
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


def _errors_of_jitter(args: Namespace) -> Iterator[str]:
    """Yield an error if the jitter of the router's input is too small for the dtype of the input."""
    jitter, dtype = args.moe_input_jitter_eps, "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    if jitter and jitter <= (smallest := torch.finfo(_DTYPES[dtype]).eps / 2):
        yield (
            f"--moe-input-jitter-eps {jitter:g} vanishes in {dtype}, where 1 + {jitter:g} is 1: use more than "
            f"{smallest:g}, or leave the flag out"
        )
