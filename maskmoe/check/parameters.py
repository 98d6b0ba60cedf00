"""Counts the parameters of a whole model and of every pipeline stage, exactly: by building them without memory.

Stages are built by the run's own model builder, on tensors that have a shape but no storage, in a process group that
exists in name only. Attention and experts come from Megatron's local modules, whose parameters have the shapes of
Transformer Engine's, so that a machine without it can count for one with it.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskmoe.check.layout import Layout
from maskmoe.megatron_compat.patches import latent_projections_without_transformer_engine
from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask
from maskmoe.training.model_builder import MaskMoEGPTModelBuilder, MaskMoEGPTModelConfig
from maskmoe.transformer.gpt_model import MaskMoEGPTModel
from maskmoe.transformer.experts import GroupedMLP
from maskmoe.transformer.layer_specs import map_spec
from maskmoe.transformer.visible_experts import VisibleExperts

PARTS = ("embedding", "output layer", "layers without routed experts", "routed experts", "multi-token prediction")

# What local modules refuse, and what has no part in the shapes of parameters.
_LOCAL = {
    "transformer_impl": "local",
    "perform_initialization": False,
    "use_cpu_initialization": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "memory_efficient_layer_norm": False,
    "layernorm_zero_centered_gamma": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "tp_comm_overlap": False,
    "context_parallel_size": 1,
    "fp8": None,
    "fp4": None,
}
_ONE_RANK = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
_ALONE = Layout(**dict.fromkeys((field.name for field in dataclasses.fields(Layout)), 1))


@dataclass(frozen=True)
class Chunk:
    """What one model chunk holds: a pipeline stage, or a part of one if the pipeline is interleaved.

    Attributes:
        parameters: numbers of parameters by part, see `PARTS`.
        expert_parameters: how many of them belong to routed experts, those of multi-token prediction included.
        buffer_bytes: bytes of buffers other than the routing mask's.
        dense_layers, moe_layers: decoder layers of each kind.
        mtp_layers: layers of multi-token prediction.
        has_embedding, has_output: whether it reads token ids, and whether it computes logits.
    """

    parameters: Mapping[str, int]
    expert_parameters: int
    buffer_bytes: int
    dense_layers: int
    moe_layers: int
    mtp_layers: int
    has_embedding: bool
    has_output: bool

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def dense_parameters(self) -> int:
        return self.num_parameters - self.expert_parameters

    @property
    def layers(self) -> int:
        return self.dense_layers + self.moe_layers


@dataclass(frozen=True)
class ModelParameters:
    """A model as a whole, and as its pipeline stages hold it.

    Attributes:
        whole: the model on one rank.
        stages: for each pipeline stage the chunks of one of its ranks.
    """

    whole: Chunk
    stages: tuple[tuple[Chunk, ...], ...]


def count_parameters(config: MaskMoEGPTModelConfig, layout: Layout) -> ModelParameters:
    """Count the parameters of a model on a layout.

    Args:
        config: the model's configuration; its `routing_mask` is not read.
        layout: how the model is divided; must divide. Any number of ranks takes the same time.
    """
    with _named_process_group(_ALONE, rank=0) as groups:
        whole = _count_chunk(_with(config, _LOCAL | _ONE_RANK), groups, vp_stage=None)
    config = _with(config, _LOCAL)
    ranks_of_stage = layout.ranks // layout.pipeline
    stages = []
    for stage in range(layout.pipeline):
        # In Megatron's default order of ranks; the parameters of a stage do not depend on the order.
        with _named_process_group(layout, rank=stage * ranks_of_stage) as groups:
            interleaved = config.transformer.virtual_pipeline_model_parallel_size
            vp_stages = range(interleaved) if interleaved else [None]
            stages.append(tuple(_count_chunk(config, groups, vp_stage) for vp_stage in vp_stages))
    return ModelParameters(whole, tuple(stages))


def mask_bytes(config: MaskMoEGPTModelConfig, mask: RoutingMask) -> int:
    """Bytes that a routing mask takes on the device, in each model chunk."""
    buffers = VisibleExperts(config.transformer, mask, ProcessGroupCollection()).buffers()
    return sum(buffer.nbytes for buffer in buffers)


class _OneForAllExperts(SequentialMLP):
    """One expert where there are `num_local_experts` of the same shape; its parameters say how many they stand for."""

    def __init__(self, num_local_experts: int, *args, **kwargs):
        super().__init__(1, *args, **kwargs)
        for parameter in self.parameters():
            parameter.stands_for = num_local_experts


class _CoreAttention(torch.nn.Module):
    """The parameters of attention between its projections: none, or an offset for each head."""

    def __init__(self, *args, config, pg_collection, **kwargs):
        super().__init__()
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads))


class _LatentProjection(torch.nn.Linear):
    """The parameters of a projection between hidden states and the rows that experts get."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool, **kwargs):
        super().__init__(input_size, output_size, bias)


class _CountingModelBuilder(MaskMoEGPTModelBuilder):
    """The run's model builder, with a routing mask that fits any model and without what is as good as counted."""

    def visible_experts(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> VisibleExperts:
        config = self._model_config.transformer
        return VisibleExperts(config, _mask_of_one_id(config.num_moe_experts), pg_collection, vp_stage)

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> tuple[Any, Any]:
        replacements = {GroupedMLP: _OneForAllExperts, DotProductAttention: _CoreAttention}

        def substitute(node: Any) -> Any:
            return replacements.get(node, node) if isinstance(node, type) else node

        block_spec, mtp_block_spec = super().layer_specs(visible_experts, vp_stage)
        return map_spec(block_spec, substitute), map_spec(mtp_block_spec, substitute)


def _mask_of_one_id(num_experts: int) -> RoutingMask:
    singletons = np.packbits(np.eye(num_experts, dtype=bool), axis=1, bitorder="little")
    provenance = MaskProvenance("uniform", 0.0, None, seed=0, shared_table=True)
    return RoutingMask(np.zeros((1, 1), np.int16), singletons[None], 1, num_experts, 1, provenance)


def _with(config: MaskMoEGPTModelConfig, settings: Mapping[str, Any]) -> MaskMoEGPTModelConfig:
    transformer = copy.copy(config.transformer)
    for name, value in settings.items():
        setattr(transformer, name, value)
    return dataclasses.replace(config, transformer=transformer)


@contextmanager
def _named_process_group(layout: Layout, rank: int) -> Iterator[ProcessGroupCollection]:
    """Process groups of a rank that is alone: they have size and rank but nothing is ever sent."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _count_chunk(config: MaskMoEGPTModelConfig, groups: ProcessGroupCollection, vp_stage: int | None) -> Chunk:
    with FakeTensorMode(), latent_projections_without_transformer_engine(_LatentProjection):
        model = _CountingModelBuilder(config).build_model(groups, vp_stage=vp_stage)
    parameters = Counter(dict.fromkeys(PARTS, 0))
    expert_parameters = 0
    for name, parameter in model.named_parameters():
        number = parameter.numel() * getattr(parameter, "stands_for", 1)
        parameters[_part_of(name)] += number
        expert_parameters += number if ".mlp.experts." in name else 0
    moe_layers = sum(isinstance(layer.mlp, MoELayer) for layer in model.decoder.layers)
    return Chunk(
        parameters=dict(parameters),
        expert_parameters=expert_parameters,
        buffer_bytes=sum(_buffer_bytes(name, buffer, config) for name, buffer in model.named_buffers()),
        dense_layers=len(model.decoder.layers) - moe_layers,
        moe_layers=moe_layers,
        mtp_layers=_mtp_depth(model),
        has_embedding=model.pre_process,
        has_output=model.post_process,
    )


def _part_of(name: str) -> str:
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output layer"
    if name.startswith("mtp."):
        return "multi-token prediction"
    return "routed experts" if ".mlp.experts." in name else "layers without routed experts"


def _buffer_bytes(name: str, buffer: torch.Tensor, config: MaskMoEGPTModelConfig) -> int:
    """Bytes of a buffer in training, where `Float16Module` casts those of floats, but routers keep theirs in fp32."""
    if name.startswith("routing_mask."):
        return 0
    is_cast = buffer.is_floating_point() and ".router." not in name
    return buffer.numel() * (config.transformer.params_dtype if is_cast else buffer.dtype).itemsize


def _mtp_depth(model: MaskMoEGPTModel) -> int:
    return model.config.mtp_num_layers if getattr(model, "mtp_process", False) else 0
