"""The settings that training refuses beside a routing mask: one list, in the order of the reports.

A setting is here because with it a run would compute something wrong without a word, hang, or lose data, or because the
setting has no meaning with masked routing. What Megatron itself refuses is not here.
"""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import inf, isfinite

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_layer import TransformerLayer
from packaging.version import Version

from maskmoe.arguments.ranges import split
from maskmoe.megatron_compat.gpu import LEAST_VERSION_OF_PERMUTATION, GpuPackages
from maskmoe.routing_mask.feed_forward_layers import LAYER_FREQUENCY_ERROR, is_layer_frequency
from maskmoe.transformer.dispatch.flex import missing_library
from maskmoe.transformer.token_ids import takes_token_ids
from maskmoe.transformer.torch_modules.gated_delta_net import check_gated_delta_net, uses_fla

Predicate = Callable[[Namespace], bool]

# Settings that must be above zero if they are given: divisors of other sizes, lengths and intervals.
_ABOVE_ZERO = (
    *("num_layers", "hidden_size", "num_attention_heads", "seq_length", "num_experts", "moe_router_topk"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_distributed_optimizer_instances"),
    *("micro_batch_size", "global_batch_size", "eval_micro_batch_size", "eval_global_batch_size"),
    *("train_iters", "train_samples", "log_interval", "eval_interval", "save_interval", "save_retain_interval", "seed"),
    *("kv_channels", "ffn_hidden_size", "moe_ffn_hidden_size", "distributed_timeout_minutes"),
)
# Settings that must be from 0 to 1 if they are given.
_SHARES = ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps", "adam_beta1", "adam_beta2")
# Megatron adds to the seed on some ranks, and NumPy takes seeds below 2**32.
_LARGEST = dict.fromkeys(_SHARES, 1) | {"seed": 2**31}
# Settings that must not be negative if they are given.
_NOT_NEGATIVE = (
    *("lr", "min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "decoupled_lr"),
    *("weight_decay", "start_weight_decay", "clip_grad", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    *("moe_router_bias_update_rate", "eval_iters", "num_workers", "adam_eps", "init_method_std", "mtp_num_layers"),
    *_SHARES,
)


@dataclass(frozen=True)
class Check:
    """A check of parsed arguments, which Megatron need not have validated.

    Attributes:
        name: The flags of the setting.
        reason: A sentence that says why, and what to use instead if there is something.
        applies: Returns whether parsed arguments have the setting.
    """

    name: str
    reason: str
    applies: Predicate

    @property
    def message(self) -> str:
        """The error of a run with the setting."""
        return f"{self.name} is not supported. {self.reason}"


# ---- The functions of this module take parsed arguments; Megatron need not have validated them. ----------------------


def value_errors(args: Namespace) -> Iterator[str]:
    """Yield an error for each number out of its range, and for `--moe-layer-freq` or `--split` without a meaning."""
    for name, setting in vars(args).items():
        for value in setting if isinstance(setting, list | tuple) else (setting,):
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            flag = f"--{name.replace('_', '-')}"
            if not isfinite(value):
                yield f"{flag} must be a finite number, not {value}"
            elif name in _ABOVE_ZERO and value <= 0:
                yield f"{flag} must be above 0, not {value:g}"
            elif name in _NOT_NEGATIVE and value < 0:
                yield f"{flag} must not be negative, but is {value:g}"
            elif value > _LARGEST.get(name, inf):
                yield f"{flag} must be at most {_LARGEST[name]}, not {value:g}"
    if not is_layer_frequency(args.moe_layer_freq, has_experts=bool(args.num_experts)):
        yield LAYER_FREQUENCY_ERROR
    if args.split is not None:
        try:
            split(args.split)
        except ArgumentTypeError as problem:
            yield f"--split {problem}"


def missing_flags(args: Namespace, has_checkpoint: bool) -> Iterator[str]:
    """Yield an error for each missing flag that Megatron reports late, or by another name.

    If the run loads a checkpoint, the settings of the checkpoint can replace the arguments'.
    """
    if not (args.perform_initialization or has_checkpoint or args.pretrained_checkpoint):
        yield "no initial weights: leave --no-initialization out, because no checkpoint is loaded"
    if args.seq_length is None and args.encoder_seq_length is None:
        settings = ", or --use-checkpoint-args for the settings of the checkpoint" if has_checkpoint else ""
        yield f"no sequence length: pass --seq-length{settings}"
    is_evaluation = hasattr(args, "eval_split")
    if not is_evaluation and args.train_iters is None and args.train_samples is None:
        yield "no length of training: pass --train-iters or --train-samples"
    if args.skip_train:
        return
    takes_schedule = has_checkpoint and args.use_checkpoint_opt_param_scheduler
    if args.lr is None and (not takes_schedule or args.finetune or args.no_load_optim):
        yield "no learning rate: pass --lr"


def refused_settings(args: Namespace) -> Iterator[str]:
    """Yield an error for every setting that is refused."""
    yield from (check.message for check in REFUSED_SETTINGS if check.applies(args))
    if error := check_gated_delta_net(args, uses_fla()):
        yield error


def missing_transformer_engine(args: Namespace, packages: GpuPackages) -> Iterator[str]:
    """Yield an error if the layers or the optimizer need Transformer Engine, but the machines that train lack it."""
    if packages.transformer_engine:
        return
    problem = "needs Transformer Engine, which is not installed: install it, or leave the flag out"
    if args.transformer_impl == "transformer_engine":
        yield f"--transformer-impl transformer_engine {problem}"
    if args.moe_permute_fusion:
        yield f"--moe-permute-fusion {problem}"
    if args.use_precision_aware_optimizer and not args.skip_train:
        yield f"--use-precision-aware-optimizer {problem}"


def missing_libraries(args: Namespace) -> Iterator[str]:
    """Yield an error if a layer, the flex dispatcher or a flag needs a library or version that this machine lacks."""
    for setting, package, least, applies in _LEAST_VERSIONS:
        with suppress(PackageNotFoundError):
            if applies(args) and Version(found := version(package)) < Version(least):
                yield f"{setting} needs {package} {least} or newer, because {found} computes something else: install it"
    if args.wandb_project and find_spec("wandb") is None:
        yield "--wandb-project needs the Python package wandb: install it, or leave the flag out"
    lacks_pynvml = args.distributed_backend == "nccl" and find_spec("pynvml") is None
    if _is_emerging(args) and not args.skip_train and find_spec("emerging_optimizers") is None:
        yield f"--optimizer {args.optimizer} needs the Python package emerging-optimizers: install it, or use adam"
    if args.log_straggler and lacks_pynvml:
        yield "--log-straggler needs the Python package nvidia-ml-py: install it, or leave the flag out"
    if args.log_device_memory_used and lacks_pynvml:
        yield "--log-device-memory-used needs the Python package nvidia-ml-py: install it, or leave the flag out"
    if _given("save_activations_interval", "save_dgrads_interval")(args) and find_spec("transformer_engine") is None:
        yield (
            "--save-activations-interval and --save-dgrads-interval need Transformer Engine, for whose layers "
            "Megatron-Core looks: install Transformer Engine, or leave the flags out"
        )
    if _pattern_has("M")(args) and (find_spec("mamba_ssm") is None or args.transformer_impl == "local"):
        yield (
            "--hybrid-layer-pattern with M needs the Python package mamba-ssm, which needs a GPU, and "
            "--transformer-impl transformer_engine: install and set both, or use G, which plain torch can compute"
        )
    backend = _flex_backend(args)
    if backend is not None and (library := missing_library(backend)):
        yield (
            f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {backend} needs {library}, which "
            "Megatron-Core cannot use on this machine. Install it, or use --moe-token-dispatcher-type alltoall."
        )


# ---- Predicates ------------------------------------------------------------------------------------------------------


_UNSCALED_DTYPES = ("fp32", "bf16", torch.float32, torch.bfloat16)  # of moments, before and after validation
_WIRE_DTYPES = ("moe_dispatch_fwd_dtype", "moe_combine_bwd_dtype")  # of Megatron-Core after 0.19


def _given(*names: str) -> Predicate:
    """Return a predicate: one of the flags is given. A flag that the installed Megatron-Core lacks is not given."""
    return lambda args: any(getattr(args, name, None) not in (None, False) for name in names)


def _balancing_types(args: Namespace) -> list[str]:
    """Return the values of `--moe-router-load-balancing-type`."""
    types = args.moe_router_load_balancing_type
    return types if isinstance(types, list) else [types]


def _pattern_has(symbol: str) -> Predicate:
    """Return a predicate: the pattern of a hybrid model has a symbol."""
    return lambda args: symbol in (args.hybrid_layer_pattern or "")


def _has_learnable_softmax(args: Namespace) -> bool:
    return args.softmax_type == "learnable" and args.transformer_impl == "transformer_engine"


_LEAST_VERSIONS: tuple[tuple[str, str, str, Predicate], ...] = (
    ("--hybrid-layer-pattern with G", "flash-linear-attention", "0.5.2", _pattern_has("G")),
    ("--softmax-type learnable", "transformer-engine", "2.14", _has_learnable_softmax),
    ("--moe-permute-fusion", "transformer-engine", LEAST_VERSION_OF_PERMUTATION, lambda args: args.moe_permute_fusion),
)
"""Settings with which older versions of a package compute something wrong without a word."""


def _pattern_contradicts_flags(args: Namespace) -> bool:
    pattern = args.hybrid_layer_pattern
    return pattern is not None and (
        args.num_layers not in (None, len(pattern.partition("/")[0].replace("|", "")))
        or args.moe_layer_freq != 1
        or ("*" in pattern and args.multi_latent_attention)
        or args.mtp_num_layers not in (None, pattern.count("/"))
    )


def _flex_backend(args: Namespace) -> str | None:
    """Return the library that sends tokens for the flex dispatcher; None with another dispatcher."""
    if args.moe_token_dispatcher_type != "flex":
        return None
    return "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend


def _captures_graphs(args: Namespace) -> bool:
    return args.cuda_graph_impl != "none"


def _captures_experts(args: Namespace) -> bool:
    """Return whether CUDA graphs would capture more than attention and dense MLPs of Transformer Engine.

    Layers that take `input_ids`, of Megatron-Core after 0.19, give the ids to every graph, which was captured without.
    """
    modules = {getattr(module, "name", module) for module in args.cuda_graph_modules or ["full"]}
    is_supported = args.cuda_graph_impl == args.transformer_impl == "transformer_engine" and modules <= {"attn", "mlp"}
    return _captures_graphs(args) and (takes_token_ids(TransformerLayer) or not is_supported)


def _redraws_in_recomputation(args: Namespace) -> bool:
    """Return whether recomputation would not rewind random numbers that a layer draws.

    Generators of CUDA graphs have states that are handles, so a recomputed part continues where the forward pass ended.
    """
    if not args.te_rng_tracker and not _captures_graphs(args):
        return False
    jitter, dropout = args.moe_input_jitter_eps, args.attention_dropout
    if args.recompute_granularity == "full":
        return bool(args.hidden_dropout or dropout or jitter)
    modules = args.recompute_modules or ("core_attn",)
    draws = ("core_attn" in modules and dropout) or ("moe" in modules and jitter)
    return bool(draws) and (args.recompute_activations or args.recompute_granularity == "selective")


def _chunks_of_layout(args: Namespace) -> list[list[LayerType]]:
    """Return the layers of each model chunk in `--pipeline-model-parallel-layout`; nothing without the flag."""
    layout = args.pipeline_model_parallel_layout or ""
    if isinstance(layout, PipelineParallelLayerLayout):  # of a configuration: [pipeline ranks, chunks of a rank]
        return [chunk for chunks in zip(*layout.layout, strict=True) for chunk in chunks]
    try:
        return PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError:
        return []  # Megatron reports a layout that it cannot parse.


def _is_interleaved(args: Namespace) -> bool:
    """Return whether a pipeline rank holds several model chunks."""
    is_given = _given("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")(args)
    chunks = max(len(_chunks_of_layout(args)), (args.hybrid_layer_pattern or "").count("|") + 1)
    return is_given or chunks > args.pipeline_model_parallel_size


def _hides_prediction(args: Namespace) -> bool:
    """Return whether a layout puts multi-token prediction where Megatron-Core misses its copy of the embedding.

    Megatron-Core looks in the first chunk of the first pipeline rank, and in the last chunk of each other rank.
    """
    chunks = _chunks_of_layout(args)
    searched = {0, *range(len(chunks) - args.pipeline_model_parallel_size + 1, len(chunks))}
    return any(LayerType.mtp in chunk and number not in searched for number, chunk in enumerate(chunks))


def _groups_do_not_fit(args: Namespace) -> bool:
    """Return whether k experts cannot be chosen from the groups of group-limited routing, one from each at least."""
    groups, chosen = args.moe_router_num_groups, args.moe_router_group_topk
    if not (args.num_experts and groups and chosen):
        return False
    return not chosen <= args.moe_router_topk <= chosen * (args.num_experts // groups)


def _pads_beyond_tokens(args: Namespace) -> bool:
    if not (args.num_experts and args.moe_pad_expert_input_to_capacity):
        return False
    return (args.moe_expert_capacity_factor or 0) * args.moe_router_topk > args.num_experts


def _needs_sequence_parallelism(args: Namespace) -> bool:
    is_divided = args.tensor_model_parallel_size > 1 and not args.sequence_parallel
    is_concerned = bool(args.num_experts) or _pattern_has("G")(args) or _has_latent_attention(args)
    return is_concerned and is_divided and not args.skip_train


def _loses_gradients_of_experts(args: Namespace) -> bool:
    overlaps = args.overlap_dispatch_backward_with_experts_wgrad
    return overlaps and (args.overlap_grad_reduce or not args.gradient_accumulation_fusion)


def _lacks_grouped_layers(args: Namespace) -> bool:
    """Return whether flags for grouped linear layers of Transformer Engine are given for another model."""
    is_grouped = args.moe_grouped_gemm or not args.num_experts
    is_asked_for = _given("fp8", "fp4", "te_precision_config_file", "save_tokens_per_expert_interval")(args)
    return is_asked_for and not (args.transformer_impl == "transformer_engine" and is_grouped)


def _is_emerging(args: Namespace) -> bool:
    """Return whether the optimizer is one of the package emerging-optimizers, such as Muon and Lion."""
    return args.optimizer not in ("adam", "sgd")


def _is_divided_by_layers(args: Namespace) -> bool:
    """Return whether ranks share an optimizer by whole parameters."""
    return _is_emerging(args) and (args.use_distributed_optimizer or args.optimizer == "dist_muon")


def _lacks_wrapper_of_optimizer(args: Namespace) -> bool:
    """Return whether Megatron-Core would lack the wrapper of an optimizer of emerging-optimizers."""
    has_instances = args.num_distributed_optimizer_instances > 1
    fails_if_divided = not args.bf16 or has_instances or args.use_precision_aware_optimizer
    return _is_emerging(args) and (args.fp16 or (_is_divided_by_layers(args) and fails_if_divided))


def _aligns_reductions_of_stages(args: Namespace) -> bool:
    """Return whether all pipeline stages but the first reduce their gradients at the end of a step."""
    return args.overlap_grad_reduce and args.align_grad_reduce and args.pipeline_model_parallel_size > 1


def _miscounts_gradients_of_experts(args: Namespace) -> bool:
    """Return whether shares of an optimizer mistake the ranks that hold the same or other parts of the experts."""
    tp = args.tensor_model_parallel_size
    expert_tp = args.expert_tensor_parallel_size or tp
    has_other_ranks = args.add_bias_linear or tp > expert_tp * args.expert_model_parallel_size
    return _is_divided_by_layers(args) and bool(args.num_experts) and expert_tp != tp and has_other_ranks


def _joins_queries_and_keys(args: Namespace) -> bool:
    """Return whether a rank has a part of a query group, which Muon does not split into queries, keys and values."""
    has_parts = args.group_query_attention and args.num_query_groups < args.tensor_model_parallel_size
    return args.optimizer in ("muon", "dist_muon") and args.muon_split_qkv and has_parts


def _keeps_no_largest_scores(args: Namespace) -> bool:
    """Return whether Megatron-Core would log the largest attention score of a layer that keeps none."""
    has_scores = args.transformer_impl == "transformer_engine" and not _pattern_has("M")(args)
    return args.log_max_attention_logit and not (has_scores and (args.bf16 or args.fp16))


def _is_gpt_of_transformer_engine(args: Namespace) -> bool:
    """Return whether the model is Megatron's GPT model with layers of Transformer Engine."""
    return args.transformer_impl == "transformer_engine" and args.hybrid_layer_pattern is None


def _has_clamp_or_offset(args: Namespace) -> bool:
    return args.activation_func_clamp_value is not None or args.glu_linear_offset != 0


def _changes_activation_of_transformer_engine(args: Namespace) -> bool:
    # A configuration has the function in place of the flag.
    is_quick = getattr(args, "quick_geglu", False) or getattr(args, "activation_func", None) is quick_gelu
    uses_functions = args.use_transformer_engine_op_fuser or args.use_te_activation_func
    return (uses_functions and _has_clamp_or_offset(args)) or (args.use_transformer_engine_op_fuser and is_quick)


def _has_latent_attention(args: Namespace) -> bool:
    return args.multi_latent_attention or _pattern_has("+")(args)


def _fuses_positions_of_latent_attention(args: Namespace) -> bool:
    return args.apply_rope_fusion and _has_latent_attention(args)


def _sets_yarn_in_vain(args: Namespace) -> bool:
    """Return whether flags of YaRN are given that latent attention ignores."""
    is_given = any(value is not None for name, value in vars(args).items() if name.startswith("yarn_"))
    return is_given and _has_latent_attention(args)


def _divides_weights_further(args: Namespace) -> bool:
    """Return whether ranks hold smaller parts of weights than tensor parallelism gives them."""
    tp = args.tensor_model_parallel_size
    shards = getattr(args, "tensor_parallel_num_weight_shards", None) or 0
    expert_shards = getattr(args, "expert_tensor_parallel_num_weight_shards", None) or 0
    return shards > tp or expert_shards > (args.expert_tensor_parallel_size or tp)


def _pickles_scales(args: Namespace) -> bool:
    return bool(args.fp8 and args.fp8_recipe in ("delayed", "custom")) or bool(args.fp4 and args.fp4_recipe == "custom")


def _cuts_documents(args: Namespace) -> bool:
    """Return whether packed documents would be cut, or their bounds forgotten."""
    balances_samples = "seq_aux_loss" in _balancing_types(args) and (args.micro_batch_size or 1) > 1
    changes_lengths = args.context_parallel_size > 1 or _captures_graphs(args) or args.fim_data
    return args.dataloader_inter_document_masking and (changes_lengths or balances_samples)


def _ignores_reset_masks(args: Namespace) -> bool:
    if not args.reset_attention_mask or args.dataloader_inter_document_masking:
        return False
    return not args.create_attention_mask_in_dataloader or args.transformer_impl == "transformer_engine"


def _ignores_communication_of_contexts(args: Namespace) -> bool:
    is_gathered = args.transformer_impl == "local" and args.context_parallel_size > 1
    return is_gathered and not {"p2p", "all_gather"}.issuperset(args.cp_comm_type)


def _miscounts_batch_schedule(args: Namespace) -> bool:
    """Return whether Megatron-Core would count the samples of a schedule as if all batches had one size."""
    counts_iterations = args.train_samples is None and not args.skip_train
    counts_wrongly = counts_iterations or args.phase_transition_iterations is not None or _captures_graphs(args)
    return args.step_batch_size_schedule is not None and counts_wrongly


def _flags(reasons: Mapping[str, str]) -> Iterator[Check]:
    """Yield a check for each group of flags, separated by spaces, that is refused in every combination."""
    for flags, reason in reasons.items():
        *others, last = flags.split()
        names = (flag.removeprefix("--").replace("-", "_") for flag in flags.split())
        yield Check(f"{', '.join(others)} or {last}" if others else last, reason, _given(*names))


# ---- The list --------------------------------------------------------------------------------------------------------

MEANINGLESS_WITH_A_MASK = (
    Check(
        "--routing-mask without --num-experts",
        "A model without experts has nothing to route.",
        lambda args: args.routing_mask is not None and not args.num_experts,
    ),
    Check(
        "--hybrid-layer-pattern with E without --num-experts, or without E with --num-experts",
        "The symbol E is for an MoE layer, and experts are in MoE layers only.",
        lambda args: args.hybrid_layer_pattern is not None and _pattern_has("E")(args) != bool(args.num_experts),
    ),
    Check(
        "--moe-router-topk above --num-experts",
        "A token cannot use more experts than there are.",
        lambda args: bool(args.num_experts) and args.moe_router_topk > args.num_experts,
    ),
    Check(
        "--moe-router-load-balancing-type sinkhorn or quantile_balancing",
        "Both balance the tokens over all experts, invisible experts included.",
        lambda args: not {"sinkhorn", "quantile_balancing"}.isdisjoint(_balancing_types(args)),
    ),
    Check(
        "--moe-router-fusion or --transformer-impl inference_optimized",
        "These routers ignore the routing mask. On GPUs, torch compiles MaskMoE's router without a flag.",
        lambda args: args.moe_router_fusion or args.transformer_impl == "inference_optimized",
    ),
    *_flags(
        {
            "--spec --experimental-attention-variant --linear-attention-freq --heterogeneous-layers-config-path "
            "--heterogeneous-layers-config-encoded-json": "MaskMoE builds the layer specification itself, because "
            "Megatron-Core's MoE layers ignore the mask.",
            "--moe-n-hash-layers": "The routing mask decides for every layer. `maskmoe mask --expert-table` builds "
            "a mask from the table of the hash layers.",
            "--moe-routing-trace-path": "Megatron's trace leaves out every layer in which a token has fewer than k "
            "experts. Use maskmoe analyze.",
            "--moe-router-padding-for-quantization --moe-router-padding-for-fp8": "The router would send tokens to "
            "invisible experts. Transformer Engine's experts pad their rows without a flag.",
            "--moe-use-upcycling": "A dense checkpoint holds no routing mask. Use maskmoe convert upcycle.",
            "--sft": "Megatron-Core's dataset fills up each sample with one id, which the routing mask sends to few "
            "experts. Tokenize the conversations first, and use --dataloader-inter-document-masking.",
        }
    ),
)
"""The settings that contradict a routing mask."""

BROKEN_IN_MEGATRON = (
    Check(
        "--moe-router-group-topk with another --moe-router-topk than the chosen groups can serve",
        "Each chosen group gives at least one expert, and at most --num-experts / --moe-router-num-groups.",
        _groups_do_not_fit,
    ),
    Check(
        "--moe-router-topk-scaling-factor of 0 or below",
        "Megatron-Core ignores 0, and dispatch marks experts that are not selected by a negative weight.",
        lambda args: args.moe_router_topk_scaling_factor is not None and args.moe_router_topk_scaling_factor <= 0,
    ),
    Check(
        "--mlp-chunks-for-training above 1",
        "The losses of the router would weigh as many times as there are chunks. Use --recompute-modules moe.",
        lambda args: (args.mlp_chunks_for_training or 0) > 1,
    ),
    Check(
        "--moe-token-dispatcher-type flex without --bf16",
        "DeepEP, HybridEP and NCCL-EP send bf16 only.",
        lambda args: _flex_backend(args) is not None and not args.bf16,
    ),
    Check(
        "--moe-apply-probs-on-input with --moe-router-topk above 1",
        "Megatron-Core weighs the input of an expert only if a token has one expert.",
        lambda args: bool(args.num_experts) and args.moe_apply_probs_on_input and args.moe_router_topk > 1,
    ),
    Check(
        "--moe-apply-probs-on-input with --moe-pad-expert-input-to-capacity, without --disable-bias-linear",
        "Rows of padding would add the biases of experts that a token has not chosen.",
        lambda args: args.moe_apply_probs_on_input and args.moe_pad_expert_input_to_capacity and args.add_bias_linear,
    ),
    Check(
        "--moe-shared-expert-overlap with --activation-func-clamp-value, --glu-linear-offset or --moe-latent-size",
        "Overlapped shared experts ignore clamp and offset, and fail beside latent experts. Leave the overlap out.",
        lambda args: args.moe_shared_expert_overlap and (_has_clamp_or_offset(args) or _given("moe_latent_size")(args)),
    ),
    Check(
        "--use-transformer-engine-op-fuser or --use-te-activation-func with --activation-func-clamp-value or "
        "--glu-linear-offset, and the former with --quick-geglu",
        "Transformer Engine's functions ignore clamp and offset, or set them to 7 and 1. Leave the flags out.",
        _changes_activation_of_transformer_engine,
    ),
    Check(
        "--moe-pad-expert-input-to-capacity with --moe-expert-capacity-factor above --num-experts / --moe-router-topk",
        "An expert would get more rows than there are tokens, and Megatron-Core would fail in the first step.",
        _pads_beyond_tokens,
    ),
    Check(
        "--tensor-model-parallel-size above 1 without --sequence-parallel",
        "Megatron-Core trains experts, G and latent attention in parts only if sequences are divided, too.",
        _needs_sequence_parallelism,
    ),
    Check(
        "--overlap-dispatch-backward-with-experts-wgrad with --overlap-grad-reduce or "
        "--no-gradient-accumulation-fusion",
        "Megatron-Core would reduce the experts' gradients before they are computed, or never read them.",
        _loses_gradients_of_experts,
    ),
    Check(
        "--fp8-format, --fp4-format, --te-precision-config-file or --save-tokens-per-expert-interval without "
        "--transformer-impl transformer_engine and --moe-grouped-gemm",
        "Megatron-Core's local layers ignore the flags, and its other experts neither pad nor count rows.",
        _lacks_grouped_layers,
    ),
    Check(
        "--position-embedding-type mrope or relative",
        "A language model would have no positions, or fail in the first step. Use rope.",
        lambda args: args.position_embedding_type in ("mrope", "relative"),
    ),
    Check(
        "latent attention without --no-rope-fusion",
        "Megatron-Core's fused kernels read queries that they have rotated already, and can rotate those of the next "
        "token, too.",
        _fuses_positions_of_latent_attention,
    ),
    Check(
        "--yarn-original-max-position-embeddings, --yarn-beta-fast, --yarn-beta-slow, "
        "--yarn-correction-range-round-to-int or --no-yarn-correction-range-round-to-int with latent attention",
        "Megatron-Core's latent attention reads these settings by other names, for which there are no flags.",
        _sets_yarn_in_vain,
    ),
    Check(
        "--log-max-attention-logit without --transformer-impl transformer_engine and --bf16 or --fp16, or with M in "
        "--hybrid-layer-pattern",
        "Megatron-Core would fail after the first step, because only Transformer Engine's attention keeps its largest "
        "scores, and Megatron-Core looks for them in every layer of a model in half precision.",
        _keeps_no_largest_scores,
    ),
    Check(
        "--defer-embedding-wgrad-compute with --hybrid-layer-pattern or without --transformer-impl transformer_engine",
        "Megatron-Core would fail in the first step: only a GPT model with Transformer Engine's layers has the buffer.",
        lambda args: args.defer_embedding_wgrad_compute and not _is_gpt_of_transformer_engine(args),
    ),
    Check(
        "--phase-transition-iterations without --train-samples",
        "Megatron-Core computes the phases from the number of samples, and fails.",
        lambda args: bool(args.phase_transition_iterations) and args.train_samples is None,
    ),
    Check(
        "--rerun-mode report_stats",
        "Megatron-Core 0.19 knows the mode by another name, for which there is no flag, and fails.",
        lambda args: args.rerun_mode == "report_stats",
    ),
    Check(
        "--dataloader-type external",
        "Megatron-Core would read batches from the dataset itself, and fail in the first step. Use single or cyclic.",
        lambda args: args.dataloader_type == "external",
    ),
    Check(
        "--cpu-offloading-num-layers with --hybrid-layer-pattern",
        "Megatron-Core's hybrid model ignores the flag. Use recomputation.",
        lambda args: args.hybrid_layer_pattern is not None and args.cpu_offloading_num_layers > 0,
    ),
    Check(
        "--cross-entropy-loss-fusion without --bf16",
        "The fused loss rounds gradients to bf16.",
        lambda args: args.cross_entropy_loss_fusion and not args.bf16,
    ),
    Check(
        "--hybrid-layer-pattern with another --num-layers, --moe-layer-freq, --multi-latent-attention or "
        "--mtp-num-layers",
        "Megatron-Core ignores the flags. In a pattern, *E is a layer with experts, *- is one without, + is latent "
        "attention, and /*E predicts one more token.",
        _pattern_contradicts_flags,
    ),
    Check(
        "--recompute-num-layers above 1 with --recompute-method uniform and multi-token prediction",
        "Megatron-Core recomputes multi-token prediction layer by layer, and would fail in the first step.",
        lambda args: (
            args.recompute_method == "uniform"
            and (args.recompute_num_layers or 1) > 1
            and bool(args.mtp_num_layers or _pattern_has("/")(args))
        ),
    ),
    Check(
        "--context-parallel-size above 1 with multi-token prediction",
        "Each rank averages the loss of predicted tokens over its own tokens, and ranks have different numbers.",
        lambda args: (
            args.context_parallel_size > 1
            and not args.skip_train
            and bool(args.mtp_num_layers or _pattern_has("/")(args))
        ),
    ),
    Check(
        "--fp16 with --num-experts and without --loss-scale",
        "The optimizers of the experts and of the other parameters adapt a loss scale each, but the loss has one. So "
        "after an overflow, gradients are wrong by a power of two. Use --bf16.",
        lambda args: args.fp16 and bool(args.num_experts) and args.loss_scale is None and not args.skip_train,
    ),
    Check(
        "--pipeline-model-parallel-layout with m in a chunk that is neither the first nor a rank's last chunk",
        "Megatron-Core would not find the copy of the embedding there, which multi-token prediction needs.",
        _hides_prediction,
    ),
    Check(
        "--reset-attention-mask with --no-create-attention-mask-in-dataloader or --transformer-impl transformer_engine",
        "Tokens would attend to other documents. Use --dataloader-inter-document-masking, which needs no mask.",
        _ignores_reset_masks,
    ),
    Check(
        "--fim-data without --tokenizer-type HuggingFaceTokenizer",
        "Megatron-Core's dataset turns ids into text without special tokens, which other tokenizers cannot do.",
        lambda args: args.fim_data and args.tokenizer_type != "HuggingFaceTokenizer",
    ),
    Check(
        "--step-batch-size-schedule without --train-samples, or with --phase-transition-iterations or CUDA graphs",
        "Megatron-Core counts as if all batches had one size.",
        _miscounts_batch_schedule,
    ),
    Check(
        "--iterations-to-skip or --result-rejected-tracker-filename with an interleaved pipeline",
        "To skip an iteration, Megatron-Core takes the list of the chunks' iterators for an iterator, and fails.",
        lambda args: bool(args.iterations_to_skip or args.result_rejected_tracker_filename) and _is_interleaved(args),
    ),
    Check(
        "--optimizer sgd, soap or adaptive_muon",
        "Megatron-Core cannot load the state of SGD or save that of SOAP, and its adaptive Muon lacks an attribute. "
        "Use adam or muon.",
        lambda args: args.optimizer in ("sgd", "soap", "adaptive_muon"),
    ),
    Check(
        "--te-rng-tracker or CUDA graphs, with dropout or --moe-input-jitter-eps in parts that are recomputed",
        "The backward pass would draw other random numbers than the forward pass.",
        _redraws_in_recomputation,
    ),
    Check(
        "--num-distributed-optimizer-instances above 1 with --overlap-grad-reduce and pipeline parallelism, without "
        "--no-align-grad-reduce",
        "Megatron-Core would scale and reduce the gradients of all stages but the first twice.",
        lambda args: args.num_distributed_optimizer_instances > 1 and _aligns_reductions_of_stages(args),
    ),
    Check(
        "--save-wgrads-interval with --use-distributed-optimizer, --overlap-grad-reduce and pipeline parallelism",
        "Megatron-Core would write gradients of which most are not reduced.",
        lambda args: (
            args.save_wgrads_interval is not None
            and args.use_distributed_optimizer
            and _aligns_reductions_of_stages(args)
        ),
    ),
    Check(
        "--exp-avg-dtype or --exp-avg-sq-dtype fp16 or fp8 with --fp8-format",
        "Checkpoints would lack the scales of the moments. Use bf16.",
        lambda args: bool(args.fp8) and not {args.exp_avg_dtype, args.exp_avg_sq_dtype} <= {*_UNSCALED_DTYPES},
    ),
    Check(
        "--optimizer muon or lion with --fp16; or with --use-distributed-optimizer and without --bf16, or with "
        "--num-distributed-optimizer-instances above 1 or --use-precision-aware-optimizer",
        "Megatron-Core would fail before the first step ends: it divides these optimizers among ranks in bf16 and in "
        "one way only, and has none of them for fp16.",
        _lacks_wrapper_of_optimizer,
    ),
    Check(
        "--optimizer muon with --num-query-groups below --tensor-model-parallel-size, without --muon-no-split-qkv",
        "Megatron-Core would orthogonalize queries, keys and values of a rank together, without a word.",
        _joins_queries_and_keys,
    ),
    Check(
        "--optimizer lion with another --adam-beta1 or --adam-beta2 than --lion-beta1 and --lion-beta2",
        "Megatron-Core's Lion reads Adam's flags instead of its own. Give both the same values.",
        lambda args: (
            args.optimizer == "lion" and (args.adam_beta1, args.adam_beta2) != (args.lion_beta1, args.lion_beta2)
        ),
    ),
    Check(
        "--optimizer muon or lion with --use-distributed-optimizer and another --expert-tensor-parallel-size than "
        "--tensor-model-parallel-size, with biases or fewer ranks for all experts than --tensor-model-parallel-size",
        "Megatron-Core would count gradients of experts several times, or some of them never, in the gradient norm.",
        _miscounts_gradients_of_experts,
    ),
    *_flags(
        {
            "--use-megatron-fsdp --use-torch-fsdp2": "Megatron-FSDP divides the gradient of experts once too often, "
            "and saving hangs; FSDP2 excludes expert parallelism. Use --use-distributed-optimizer.",
            "--optimizer-cpu-offload": "Checkpoints would hold classes of the optimizer, which are not read back, so "
            "no run could resume. Use --use-distributed-optimizer with more ranks.",
            "--optimizer-cuda-graph": "The first save would fail, because it compares numbers of steps by identity.",
            "--fine-grained-activation-offloading": "The first step after every start reads activations that may not "
            "have reached the host yet. Use recomputation.",
            "--qk-clip": "The clip writes NaN into weights if a group's largest score is negative, and fails with the "
            "distributed optimizer. Use --qk-layernorm.",
            "--full-validation --multiple-validation-sets --validation-set-names": "Megatron-Core reads samples "
            "several times, weighs them unequally, and fails at the test. Use maskmoe evaluate.",
            "--init-model-with-meta-device": "A run from random weights would start with whatever the "
            "memory holds, and experts lose the mark of their gradients. Leave the flag out.",
            "--decrease-batch-size-if-needed": "The run would end before --train-samples and before the end of its "
            "schedule. Choose batches that the ranks can share.",
            "--rampup-batch-size": "Megatron-Core 0.19 ignores the flag. Use --step-batch-size-schedule.",
            "--apply-residual-connection-post-layernorm --openai-gelu --vocab-extra-ids --create-all-gather-group": (
                "Megatron-Core 0.19 ignores the flags."
            ),
            "--hybrid-override-pattern --mtp-hybrid-override-pattern --is-hybrid-model --enable-cuda-graph "
            "--external-cuda-graph": "Megatron-Core replaces these old flags late. Use --hybrid-layer-pattern, and "
            "--cuda-graph-impl with --cuda-graph-modules.",
            "--exit-signal-handler-for-training --adlr-autoresume": "The run would end early with exit code 0, as if "
            "it were complete. By default, signals save a checkpoint.",
            "--checkpoint-activations": "Megatron-Core ends with exit code 0. Use --recompute-activations.",
            "--hybrid-context-parallel": "Expert-parallel ranks would wait for each other forever, because they run "
            "different numbers of micro-batches. Use --context-parallel-size.",
        }
    ),
)
"""The settings with which Megatron-Core 0.19 would compute something wrong, hang, or lose data."""

NOT_BUILT = (
    Check(
        "--qk-layernorm-all-heads without --qk-layernorm and --normalization RMSNorm",
        "The flag changes the RMSNorms of --qk-layernorm.",
        lambda args: args.qk_layernorm_all_heads and not (args.qk_layernorm and args.normalization == "RMSNorm"),
    ),
    Check(
        "--cuda-graph-impl, but for transformer_engine with --cuda-graph-modules attn or mlp and --transformer-impl "
        "transformer_engine",
        "A graph of an MoE layer needs fixed shapes, but the number of rows that a rank sends to experts varies. "
        "Without --cuda-graph-modules, whole layers would be captured. Beside graphs, Megatron-Core can drop gradients "
        "of local experts.",
        _captures_experts,
    ),
    Check(
        "--fp8-recipe delayed, the default, or custom; or --fp4-recipe custom",
        "A checkpoint would hold the scales as a pickle with code, which Transformer Engine refuses to load. Use "
        "tensorwise, blockwise or mxfp8.",
        _pickles_scales,
    ),
    Check(
        "--dataloader-inter-document-masking with --context-parallel-size above 1, CUDA graphs, --fim-data, or "
        "--moe-router-load-balancing-type seq_aux_loss and --micro-batch-size above 1",
        "These settings are for samples of one length, but documents have any length.",
        _cuts_documents,
    ),
    Check(
        "--mla-down-proj-fusion without --transformer-impl transformer_engine, or with --hybrid-layer-pattern",
        "The flag is for the latent attention of Transformer Engine in Megatron-Core's GPT model.",
        lambda args: args.mla_down_proj_fusion and not _is_gpt_of_transformer_engine(args),
    ),
    Check(
        "--cp-comm-type other than p2p or all_gather with --transformer-impl local",
        "torch's attention always gathers keys and values. Leave the flag out.",
        _ignores_communication_of_contexts,
    ),
    Check(
        "--moe-pad-expert-input-to-capacity with --moe-token-dispatcher-type flex",
        "DeepEP and NCCL-EP send at most k rows of a token, so no padding. HybridEP has not been tried. Use alltoall.",
        lambda args: args.moe_pad_expert_input_to_capacity and _flex_backend(args) is not None,
    ),
    Check(
        "--hybrid-layer-pattern with D",
        "MaskMoE's layer specification has no layer of sparse attention. Use +.",
        _pattern_has("D"),
    ),
    Check(
        "--ckpt-format other than torch_dist",
        "MaskMoE verifies the files of torch_dist checkpoints only, and reads the routing mask of a run from them.",
        lambda args: args.ckpt_format != "torch_dist",
    ),
    Check(
        "--non-persistent-save-interval, --non-persistent-ckpt-type or --non-persistent-global-ckpt-dir",
        "Megatron-Core trusts a damaged non-persistent checkpoint, so a run may restart for ever (issue 5281): pass a "
        "smaller --save-interval and --keep-last-checkpoints.",
        _given("non_persistent_save_interval", "non_persistent_ckpt_type", "non_persistent_global_ckpt_dir"),
    ),
    Check(
        "--async-strategy nvrx with --async-save",
        "MaskMoE's digests need the list of files that Megatron-Core's own strategy, the default, writes.",
        lambda args: args.async_save and args.async_strategy == "nvrx",
    ),
    Check(
        "--tokenizer-special-tokens without --tokenizer-type TikTokenizer",
        "Exported models and MaskMoE's tools read the tokenizer's file only: add the tokens to the file first.",
        lambda args: bool(args.special_tokens) and args.tokenizer_type != "TikTokenizer",
    ),
    Check(
        "--override-ckpt-iteration",
        "Every start would go back to the iteration. Use --ckpt-step, which also takes the weights of the iteration.",
        lambda args: args.override_ckpt_iteration is not None,
    ),
    Check(
        "--moe-dispatch-fwd-dtype or --moe-combine-bwd-dtype",
        "MaskMoE's experts take rows in the dtype of the model only, so leave the flags at bf16.",
        lambda args: any(getattr(args, name, "bf16") != "bf16" for name in _WIRE_DTYPES),
    ),
    Check(
        "--tensor-parallel-num-weight-shards or --expert-tensor-parallel-num-weight-shards above the parallel size",
        "MaskMoE's conversion reads weights that are divided by tensor parallelism only.",
        _divides_weights_further,
    ),
    *_flags(
        {
            "--overlap-moe-expert-parallel-comm --delay-wgrad-compute --ep-overlap-early-attn-memory-release": "The "
            "schedule of the overlap calls the router without the channel on which the token ids travel.",
            "--moe-paged-stash --moe-pad-experts-for-cuda-graph-inference --moe-ncclep-static-shape "
            "--moe-ncclep-zero-copy": "The setting is for fixed shapes, but the number of rows of a rank varies.",
            "--moe-use-grouped-tensor --enable-hyper-connections --enable-mhc-connections": "MaskMoE has not been "
            "tried with these settings of later versions of Megatron-Core.",
            "--moe-mlp-glu-interleave-size --moe-shared-expert-glu-interleave-size --moe-single-grouped-weight "
            "--moe-single-grouped-bias": "MaskMoE's conversion and its transformers model read weights in the order of "
            "Megatron-Core's defaults.",
            "--inprocess-restart": "MaskMoE ends the processes of a run that hangs. Use --max-restarts of torchrun.",
            "--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --per-dataset-sequences-path": "Runs "
            "compare the datasets with their cached indices, which the flags leave unread.",
            "--ckpt-convert-format": "The result would replace the checkpoint in --save, to which alone MaskMoE saves. "
            "Use maskmoe convert.",
            "--data-parallel-random-init": "A checkpoint would hold random states for one number of ranks only.",
            "--yaml-cfg": "Megatron-Core replaces all arguments by the file. Use launch/pretrain.sh MODEL.yaml.",
            "--perform-rl-step --logits-save-dir --logits-load-dir --freeze-all-layers": "MaskMoE pretrains language "
            "models, without a reward, a teacher or frozen layers.",
        }
    ),
)
"""The settings that MaskMoE does not have."""

REFUSED_SETTINGS = MEANINGLESS_WITH_A_MASK + BROKEN_IN_MEGATRON + NOT_BUILT
"""Every refused setting, in the order in which training reports them."""
