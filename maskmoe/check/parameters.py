"""Counts the parameters of a whole model and of every pipeline stage exactly, without allocating them.

The run's own model builder builds every stage, on tensors that have a shape but no storage, in fake process groups that
never communicate. Attention and experts are Megatron's local modules, whose parameters have the shapes of Transformer
Engine's parameters. So a machine without Transformer Engine can count for a machine that has it.
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
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskmoe.check.layout import Layout
from maskmoe.megatron_compat.patches import latent_projections_without_transformer_engine
from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask
from maskmoe.training.model_builder import MaskMoEGPTModelBuilder, MaskMoEGPTModelConfig
from maskmoe.transformer.experts import GroupedMLP
from maskmoe.transformer.layer_specs import map_spec
from maskmoe.transformer.visible_experts import VisibleExperts

PARTS = ("embedding", "output layer", "layers without routed experts", "routed experts", "multi-token prediction")
_STANDS_FOR = "stands_for"

# Settings that local modules refuse, or that cost time. None of them changes the shape of a parameter.
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
    """The content of one model chunk: a pipeline stage, or a part of a stage if the pipeline is interleaved.

    Attributes:
        parameters: number of parameters of each of `PARTS`.
        expert_parameters: number of parameters of routed experts, experts of multi-token prediction included.
        buffer_bytes: bytes of all buffers, without those of the routing mask.
        dense_layers, moe_layers: numbers of decoder layers without and with experts.
        mtp_layers: number of layers of multi-token prediction.
        has_embedding, has_output: whether the chunk reads token ids, and whether it computes logits.
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
        """Return the number of all parameters."""
        return sum(self.parameters.values())

    @property
    def dense_parameters(self) -> int:
        """Return the number of parameters outside routed experts."""
        return self.num_parameters - self.expert_parameters

    @property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return self.dense_layers + self.moe_layers

    def active_parameters(self, num_experts: int, experts_per_token: float) -> float:
        """Return how many parameters a token passes through, multi-token prediction left out.

        Args:
            num_experts: number of routed experts in a layer; any positive number for a model without experts.
            experts_per_token: number of experts that the token uses.
        """
        unused = self.parameters["routed experts"] * (1 - experts_per_token / num_experts)
        return self.num_parameters - self.parameters["multi-token prediction"] - unused


@dataclass(frozen=True)
class ModelParameters:
    """The parameters of a model, and of each of its pipeline stages.

    Attributes:
        whole: the model as one rank without parallelism holds it.
        stages: the chunks of one rank of each pipeline stage.
    """

    whole: Chunk
    stages: tuple[tuple[Chunk, ...], ...]


def count_parameters(config: MaskMoEGPTModelConfig, layout: Layout) -> ModelParameters:
    """Count the parameters of a model that is divided over ranks.

    Args:
        config: the model's configuration; the file in its `routing_mask` is not read.
        layout: how the model is divided; its sizes must divide each other. The time does not depend on the number of
            ranks.
    """
    with _fake_process_groups(_ALONE, rank=0) as groups:
        whole = _count_chunk(_changed(config, _LOCAL | _ONE_RANK), groups, vp_stage=None)
    config = _changed(config, _LOCAL)
    ranks_of_stage = layout.ranks // layout.pipeline
    stages = []
    for stage in range(layout.pipeline):
        # Megatron numbers the ranks of a stage consecutively by default; the order does not change the parameters.
        with _fake_process_groups(layout, rank=stage * ranks_of_stage) as groups:
            interleaved = config.transformer.virtual_pipeline_model_parallel_size
            vp_stages = range(interleaved) if interleaved else [None]
            stages.append(tuple(_count_chunk(config, groups, vp_stage) for vp_stage in vp_stages))
    return ModelParameters(whole, tuple(stages))


def mask_bytes(config: MaskMoEGPTModelConfig, mask: RoutingMask) -> int:
    """Return the bytes that a routing mask takes on the device in each model chunk."""
    buffers = VisibleExperts(config.transformer, mask, ProcessGroupCollection()).buffers()
    return sum(buffer.nbytes for buffer in buffers)


class _RepresentativeExpert(SequentialMLP):
    """One expert in place of `num_local_experts` experts of the same shape, which would take as long to build.

    The attribute `stands_for` of its parameters is the number of experts.
    """

    def __init__(self, num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(1, *args, **kwargs)
        for parameter in self.parameters():
            setattr(parameter, _STANDS_FOR, num_local_experts)


class _CoreAttention(torch.nn.Module):
    """The parameters of attention between its projections: none, or an offset for each head."""

    def __init__(
        self, *args: Any, config: TransformerConfig, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__()
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads))


class _LatentProjection(torch.nn.Linear):
    """The parameters of a projection between hidden states and the rows that latent experts get."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, bias)


class _CountingModelBuilder(MaskMoEGPTModelBuilder):
    """The run's model builder, made fast: it needs no mask file, builds one expert a layer and no core attention."""

    def visible_experts(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> VisibleExperts:
        """Return the visible experts of a mask that fits every model."""
        # Megatron declares the base class of all configurations.
        config = self._model_config.transformer  # pyrefly: ignore[missing-attribute]
        return VisibleExperts(config, _mask_of_one_id(config.num_moe_experts), pg_collection, vp_stage)

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> tuple[Any, Any]:
        """Return the layer specifications of the run, with experts and core attention replaced."""
        replacements = {GroupedMLP: _RepresentativeExpert, DotProductAttention: _CoreAttention}

        def substitute(node: Any) -> Any:
            return replacements.get(node, node) if isinstance(node, type) else node

        block_spec, mtp_block_spec = super().layer_specs(visible_experts, vp_stage)
        return map_spec(block_spec, substitute), map_spec(mtp_block_spec, substitute)


def _mask_of_one_id(num_experts: int) -> RoutingMask:
    """Return the smallest routing mask for a number of experts."""
    singletons = np.packbits(np.eye(num_experts, dtype=bool), axis=1, bitorder="little")
    provenance = MaskProvenance("uniform", 0.0, None, seed=0, shared_table=True)
    return RoutingMask(np.zeros((1, 1), np.int16), singletons[None], 1, num_experts, 1, provenance)


def _changed(config: MaskMoEGPTModelConfig, settings: Mapping[str, Any]) -> MaskMoEGPTModelConfig:
    """Return a copy of a configuration in which some settings of the transformer are replaced."""
    transformer = copy.copy(config.transformer)
    for name, value in settings.items():
        setattr(transformer, name, value)
    return dataclasses.replace(config, transformer=transformer)


@contextmanager
def _fake_process_groups(layout: Layout, rank: int) -> Iterator[ProcessGroupCollection]:
    """Create the process groups of one rank without the other ranks; the groups cannot communicate."""
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
    """Build one model chunk on tensors without storage, and count its parameters."""
    with FakeTensorMode(), latent_projections_without_transformer_engine(_LatentProjection):
        model = _CountingModelBuilder(config).build_model(groups, vp_stage=vp_stage)
    parameters = Counter(dict.fromkeys(PARTS, 0))
    expert_parameters = 0
    for name, parameter in model.named_parameters():
        number = parameter.numel() * getattr(parameter, _STANDS_FOR, 1)
        parameters[_part_of(name)] += number
        expert_parameters += number if ".mlp.experts." in name else 0
    moe_layers = sum(isinstance(layer.mlp, MoELayer) for layer in model.decoder.layers)
    return Chunk(
        parameters=dict(parameters),
        expert_parameters=expert_parameters,
        buffer_bytes=sum(_buffer_bytes(name, buffer, config) for name, buffer in model.named_buffers()),
        dense_layers=len(model.decoder.layers) - moe_layers,
        moe_layers=moe_layers,
        mtp_layers=(model.config.mtp_num_layers or 0) if getattr(model, "mtp_process", False) else 0,
        has_embedding=model.pre_process,
        has_output=model.post_process,
    )


def _part_of(name: str) -> str:
    """Return to which of `PARTS` a parameter belongs."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output layer"
    if name.startswith("mtp."):
        return "multi-token prediction"
    return "routed experts" if ".mlp.experts." in name else "layers without routed experts"


def _buffer_bytes(name: str, buffer: torch.Tensor, config: MaskMoEGPTModelConfig) -> int:
    """Return the bytes of a buffer in training; 0 for the routing mask, which is counted separately.

    `Float16Module` casts floating-point buffers to the type of the parameters. Routers keep their buffers in fp32.
    """
    if name.startswith("routing_mask."):
        return 0
    is_cast = buffer.is_floating_point() and ".router." not in name
    return buffer.numel() * (config.transformer.params_dtype if is_cast else buffer.dtype).itemsize
