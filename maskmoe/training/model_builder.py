"""Builds the model from its configuration, with the interface of Megatron's model builders."""

from dataclasses import dataclass, fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import utils as pipeline
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.transformer.gpt_model import DenseGPTModel, MaskMoEGPTModel
from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec, get_maskmoe_mtp_block_spec
from maskmoe.transformer.router_sums import AuxLossTokens
from maskmoe.transformer.visible_experts import VisibleExperts


@dataclass(kw_only=True)
class MaskMoEGPTModelConfig(GPTModelConfig):
    """`GPTModelConfig` for a model with a routing mask, or for a model without experts to compare with."""

    builder: ClassVar[str] = "maskmoe.training.model_builder.MaskMoEGPTModelBuilder"

    routing_mask: Path | None = None
    """File of the routing mask, or a checkpoint that holds the mask. Ignored for a model without experts."""

    replaced_routing_mask: Path | None = None
    """The checkpoint to load if it may hold another routing mask, which `routing_mask` replaces."""

    aux_loss_tokens: AuxLossTokens = "all"
    """Tokens over which the load-balancing loss is averaged, see `MaskMoERouter`."""

    qk_layernorm_all_heads: bool = False
    """Normalise queries and keys over all heads together, see `AllHeadsRMSNorm`."""


class MaskMoEGPTModelBuilder(GPTModelBuilder):
    """Builds a `MaskMoEGPTModel`, or a `DenseGPTModel` if the model has no experts."""

    _model_config: Any  # a `MaskMoEGPTModelConfig`; Megatron declares the base class of all configurations

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one pipeline stage; arguments as for `GPTModelBuilder.build_model`."""
        settings = self._model_config
        config = settings.transformer
        # Without an interleaved pipeline `vp_stage` and `vp_size` are None, which Megatron accepts but does not
        # annotate.
        virtual: Any = (vp_stage, config.virtual_pipeline_model_parallel_size)
        is_first = pipeline.is_vp_first_stage(*virtual) and pipeline.is_pp_first_stage(pg_collection.pp)
        is_last = pipeline.is_vp_last_stage(*virtual) and pipeline.is_pp_last_stage(pg_collection.pp)
        visible_experts = self.visible_experts(pg_collection, vp_stage) if config.num_moe_experts else None
        block_spec, mtp_block_spec = self.layer_specs(visible_experts, vp_stage)
        model = partial(MaskMoEGPTModel, visible_experts=visible_experts) if visible_experts else DenseGPTModel
        # Megatron's configuration names most settings like the arguments of the model.
        shared = {field.name for field in fields(GPTModelConfig)} & signature(GPTModel).parameters.keys()
        return model(
            config=config,
            transformer_layer_spec=block_spec,
            mtp_block_spec=mtp_block_spec,
            max_sequence_length=settings.seq_length,
            pre_process=is_first if pre_process is None else pre_process,
            post_process=is_last if post_process is None else post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **{name: getattr(settings, name) for name in shared - {"transformer_layer_spec"}},
        )

    def visible_experts(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> VisibleExperts:
        """Return the routing mask of the run, which the routers of one pipeline stage share."""
        settings = self._model_config
        mask, replaced = read_routing_mask(settings.routing_mask), None
        if settings.replaced_routing_mask is not None:
            of_checkpoint = read_routing_mask(settings.replaced_routing_mask)
            replaced = of_checkpoint if of_checkpoint.digest != mask.digest else None
        return VisibleExperts(settings.transformer, mask, pg_collection, vp_stage, replaced)

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> tuple[Any, Any]:
        """Return the specs of one stage's decoder layers and of its multi-token prediction, which may be None."""
        settings = self._model_config
        config = settings.transformer
        described = (config, visible_experts, settings.aux_loss_tokens, vp_stage, settings.qk_layernorm_all_heads)
        block_spec = get_maskmoe_decoder_block_spec(*described)
        return block_spec, get_maskmoe_mtp_block_spec(*described) if config.mtp_num_layers else None
