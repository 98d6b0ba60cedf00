"""Builds the model from its configuration, with the interface of Megatron's configurations and builders."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel import utils as pipeline
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.base import compose_hooks
from megatron.training.models.dist_utils import unimodal_build_distributed_models
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.models.hybrid import HybridModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch.nn.functional import gelu, silu

from maskmoe.checkpoint.read_routing_mask import mask_in_checkpoint, read_routing_mask
from maskmoe.errors import UserError, megatrons_checks
from maskmoe.training.resume.find_checkpoint import checkpoint_to_load
from maskmoe.transformer.layer_specs import (
    get_maskmoe_decoder_block_spec,
    get_maskmoe_hybrid_stack_spec,
    get_maskmoe_mtp_block_spec,
    with_counts_on_device,
)
from maskmoe.transformer.models import DenseGPTModel, DenseHybridModel, MaskMoEGPTModel, MaskMoEHybridModel
from maskmoe.transformer.router import check_router_settings
from maskmoe.transformer.routing import AuxLossTokens
from maskmoe.transformer.visible_experts import VisibleExperts


@dataclass(kw_only=True)
class MaskMoEModelConfig:
    """The configuration of a model with a routing mask, or of a model without experts to compare with.

    Megatron takes it in place of its own configurations, of which it reads `pre_wrap_hooks` and `get_builder_cls`.

    Attributes:
        megatron: The settings that Megatron has, too; the class says which kind of model is built.
        routing_mask: File of the routing mask, or a checkpoint that holds the mask. Ignored without experts.
        replaced_routing_mask: The checkpoint to load if `routing_mask` may replace the mask that it holds.
        aux_loss_tokens: Tokens over which the load-balancing loss is averaged, see `MaskMoERouter`.
        qk_layernorm_all_heads: Normalise queries and keys over all heads together, see `AllHeadsRMSNorm`.
        counts_on_device: Leave the numbers of the experts' rows on the GPU, see `CountsOnDeviceMLP`.
        rope_scaling: Scale rotary embeddings as Llama 3 does.
        rope_scaling_factor: Divides low frequencies of rotary embeddings, as in Llama 3.
        builder: The class that builds the model; None: `MaskMoEGPTModelBuilder` or `MaskMoEHybridModelBuilder`.
        pre_wrap_hooks: Functions of the model chunks of a rank, which return the chunks, before they are wrapped.
    """

    megatron: GPTModelConfig | HybridModelConfig
    routing_mask: Path | str | None = None
    replaced_routing_mask: Path | None = None
    aux_loss_tokens: AuxLossTokens = "all"
    qk_layernorm_all_heads: bool = False
    counts_on_device: bool = False
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    builder: type["StageBuilder"] | None = None
    pre_wrap_hooks: list[Callable[[list[Any]], list[Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what contradicts a mask; switch off what computes something else, or fails, in Megatron-Core."""
        config = self.transformer
        if config.num_moe_experts:
            check_router_settings(config)
        if config.moe_token_dispatcher_type == "flex" and config.params_dtype is not torch.bfloat16:
            raise UserError("--moe-token-dispatcher-type flex needs --bf16: its libraries send bf16 only")
        if config.overlap_moe_expert_parallel_comm and isinstance(self.megatron, HybridModelConfig):
            raise UserError("--overlap-moe-expert-parallel-comm needs a model without --hybrid-layer-pattern")
        if self.qk_layernorm_all_heads and not (config.qk_layernorm and config.normalization == "RMSNorm"):
            raise UserError("--qk-layernorm-all-heads needs --qk-layernorm and --normalization RMSNorm")
        # The fused SwiGLU ignores the clamp. The fused GELU cannot weigh the rows of an expert. The fused quick GELU
        # must weigh rows, so it fails in dense MLPs and in shared experts.
        is_swiglu = config.activation_func is silu and config.activation_func_clamp_value is None
        if not is_swiglu and (config.num_moe_experts or config.activation_func is not gelu):
            config.bias_activation_fusion = False
        # With this cache, Transformer Engine would overwrite gradients of the first uses of a repeated layer.
        if config.mtp_use_repeated_layer:
            config.disable_parameter_transpose_cache = True

    @property
    def transformer(self) -> TransformerConfig:
        """The configuration of the layers."""
        return self.megatron.transformer

    def get_builder_cls(self) -> type["StageBuilder"]:
        """Return the class that builds the model; raise `UserError` if `builder` is for another kind of model."""
        is_hybrid = isinstance(self.megatron, HybridModelConfig)
        base = MaskMoEHybridModelBuilder if is_hybrid else MaskMoEGPTModelBuilder
        if self.builder is not None and not issubclass(self.builder, base):
            raise UserError(
                f"{self.builder.__name__} must be a {base.__name__}, because the model has "
                f"{'a' if is_hybrid else 'no'} --hybrid-layer-pattern"
            )
        return self.builder or base


class StageBuilder:
    """Base class of what builds the pipeline stages of a model with a routing mask, or of a model without experts."""

    _classes: tuple[type, type]  # without and with experts

    def __init__(self, config: MaskMoEModelConfig) -> None:
        self.config: Any = config  # the settings that may be None are given where a model needs them

    def build_distributed_models(self, pg_collection: ProcessGroupCollection, **options: Any) -> list[Any]:
        """Build and wrap the model chunks of this rank; arguments as for `unimodal_build_distributed_models`."""
        hooks = compose_hooks(self.config.pre_wrap_hooks)
        config = self.config.transformer
        return unimodal_build_distributed_models(
            self.build_model, config, pg_collection, pre_wrap_hook=hooks, **options
        )

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one pipeline stage; arguments as for `megatron.training.models.base.ModelBuilder.build_model`."""
        settings, config = self.config.megatron, self.config.transformer
        # Without an interleaved pipeline `vp_stage` and `vp_size` are None, which Megatron accepts but does not
        # annotate.
        virtual: Any = (vp_stage, config.virtual_pipeline_model_parallel_size)
        is_first = pipeline.is_vp_first_stage(*virtual) and pipeline.is_pp_first_stage(pg_collection.pp)
        is_last = pipeline.is_vp_last_stage(*virtual) and pipeline.is_pp_last_stage(pg_collection.pp)
        visible_experts = self.visible_experts(pg_collection, vp_stage) if config.num_moe_experts else None
        dense, masked = self._classes
        model = partial(masked, visible_experts=visible_experts) if visible_experts else dense
        vocab_size = settings.vocab_size
        if settings.should_pad_vocab:
            multiple, tp_size = settings.make_vocab_size_divisible_by, config.tensor_model_parallel_size
            vocab_size = calculate_padded_vocab_size(vocab_size, multiple, tp_size)
        # Megatron's configuration of a hybrid model lacks these settings.
        rope = settings if getattr(settings, "rope_scaling", False) else self.config
        specs = self.layer_specs(visible_experts, vp_stage)
        return model(
            config=config,
            vocab_size=vocab_size,
            max_sequence_length=settings.seq_length,
            fp16_lm_cross_entropy=settings.fp16_lm_cross_entropy,
            parallel_output=settings.parallel_output,
            share_embeddings_and_output_weights=settings.share_embeddings_and_output_weights,
            position_embedding_type=settings.position_embedding_type,
            rotary_percent=settings.rotary_percent,
            rotary_base=settings.rotary_base,
            rope_scaling=rope.rope_scaling,
            rope_scaling_factor=rope.rope_scaling_factor,
            seq_len_interpolation_factor=settings.seq_len_interpolation_factor,
            pre_process=is_first if pre_process is None else pre_process,
            post_process=is_last if post_process is None else post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **(with_counts_on_device(specs) if self.config.counts_on_device else specs),
        )

    def visible_experts(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> VisibleExperts:
        """Return the routing mask of the run, which the routers of one pipeline stage share."""
        settings = self.config
        mask = of_checkpoint = read_routing_mask(settings.routing_mask)
        if settings.replaced_routing_mask is not None:
            of_checkpoint = mask_in_checkpoint(settings.replaced_routing_mask)
        return VisibleExperts(
            settings.transformer,
            mask,
            pg_collection,
            vp_stage,
            replaces=of_checkpoint if of_checkpoint is not None and of_checkpoint.digest != mask.digest else None,
            hybrid_layer_pattern=getattr(settings.megatron, "hybrid_layer_pattern", None),
            is_added=of_checkpoint is None,
        )

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> dict[str, Any]:
        """Return the arguments that only this kind of model has: the specs of one stage's layers, and a setting."""
        raise NotImplementedError


class MaskMoEGPTModelBuilder(StageBuilder):
    """Builds a `MaskMoEGPTModel`, or a `DenseGPTModel` if the model has no experts."""

    _classes = (DenseGPTModel, MaskMoEGPTModel)

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> dict[str, Any]:
        """Return the specs of one stage's decoder layers and of its multi-token prediction, and a setting."""
        settings, config = self.config, self.config.transformer
        described = config, visible_experts, settings.aux_loss_tokens, vp_stage, settings.qk_layernorm_all_heads
        return {
            "transformer_layer_spec": get_maskmoe_decoder_block_spec(*described),
            "mtp_block_spec": get_maskmoe_mtp_block_spec(*described) if config.mtp_num_layers else None,
            "scatter_embedding_sequence_parallel": settings.megatron.scatter_embedding_sequence_parallel,
        }


class MaskMoEHybridModelBuilder(StageBuilder):
    """Builds a `MaskMoEHybridModel`, or a `DenseHybridModel` if the model has no experts."""

    _classes = (DenseHybridModel, MaskMoEHybridModel)

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> dict[str, Any]:
        """Return the specs of one stage's layers, multi-token prediction included, and the pattern."""
        settings = self.config
        described = visible_experts, settings.aux_loss_tokens, vp_stage, settings.qk_layernorm_all_heads
        return {
            "hybrid_stack_spec": get_maskmoe_hybrid_stack_spec(settings.transformer, *described),
            "hybrid_layer_pattern": settings.megatron.hybrid_layer_pattern,
        }


def model_config_from_args(args: Namespace, builder: type[StageBuilder] | None = None) -> MaskMoEModelConfig:
    """Return the configuration of the command line's model; raise `UserError` if settings cannot work together."""
    with megatrons_checks():
        from_args = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
        config = MaskMoEModelConfig(
            megatron=from_args(args),
            builder=builder,
            aux_loss_tokens=args.moe_aux_loss_tokens,
            qk_layernorm_all_heads=args.qk_layernorm_all_heads,
            counts_on_device=args.moe_counts_on_device,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
        )
        # Megatron has no such setting for the arguments, and its GPT model refuses CUDA graphs without it.
        config.transformer.use_te_rng_tracker = args.te_rng_tracker
    # Stages of a pipeline exchange packed documents of several samples as one sequence.
    config.transformer.variable_seq_lengths = args.dataloader_inter_document_masking and args.micro_batch_size > 1
    if args.num_experts:
        # `find_routing_mask` refuses a run without a mask.
        checkpoint = checkpoint_to_load(args)
        config.routing_mask = Path(cast(Path, args.routing_mask or checkpoint))
        config.replaced_routing_mask = checkpoint if args.change_routing_mask else None
    return config


def embedding_ranks_of(config: MaskMoEModelConfig) -> Callable[[list[int]], list[int]]:
    """Return a function from the ranks of a pipeline to those ranks that have a copy of the embedding.

    As in Megatron-LM's `pretrain_gpt.py`, these ranks are the first, the last if embedding and output layer share their
    weights, and all ranks with layers of multi-token prediction.
    """

    def embedding_ranks(ranks: list[int]) -> list[int]:
        found = {ranks[0]}
        if config.megatron.share_embeddings_and_output_weights:
            found.add(ranks[-1])
        if config.transformer.mtp_num_layers:
            found.update(get_mtp_ranks(ranks, config.transformer))
        return sorted(found)

    return embedding_ranks
