"""Counts the parameters of a whole model and of every pipeline stage exactly, without allocating them.

The run's own model builder builds every stage, on tensors that have a shape but no storage, in fake process groups that
never communicate. Attention and experts are Megatron's local modules, whose parameters have the shapes of Transformer
Engine's parameters. So a machine without Transformer Engine can count for a machine that has it.
"""

import copy
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.hybrid import HybridModelConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask, mean_experts_per_token
from maskmoe.training.model.model_builder import MaskMoEModelConfig, StageBuilder
from maskmoe.training.preflight.layout import Layout
from maskmoe.transformer.experts import LocalExperts
from maskmoe.transformer.layer_specs import map_spec
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention
from maskmoe.transformer.visible_experts import VisibleExperts

PARTS = ("embedding", "output layer", "layers without routed experts", "routed experts", "multi-token prediction")
_PART_OF_MODULE = {"embedding": "embedding", "output_layer": "output layer", "mtp": "multi-token prediction"}

# Settings that local modules refuse, or that cost time. None of them changes the shape of a parameter.
_SWITCHED_OFF = (
    *("perform_initialization", "use_cpu_initialization", "persist_layer_norm", "memory_efficient_layer_norm"),
    *("moe_grouped_gemm", "moe_permute_fusion", "moe_shared_expert_overlap", "tp_comm_overlap"),
)
_LOCAL = {
    "transformer_impl": "local",
    "moe_token_dispatcher_type": "alltoall",  # the machine of the check may lack the flex dispatcher's libraries
    "context_parallel_size": 1,
    "fp8": None,
    "fp4": None,
    **dict.fromkeys(_SWITCHED_OFF, False),
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
_ALONE = Layout(*[1] * len(fields(Layout)))


@dataclass(frozen=True)
class Chunk:
    """The content of one model chunk: a pipeline stage, or a part of a stage if the pipeline is interleaved.

    Attributes:
        parameters: Number of parameters of each of `PARTS`.
        expert_parameters: Number of parameters of routed experts, experts of multi-token prediction included.
        buffer_bytes: Bytes of all buffers, without those of the routing mask.
        layers: The symbols of each decoder layer, as in `--hybrid-layer-pattern`. A layer of a `GPTModel` is two
            symbols, such as `*E` for attention and experts. A layer of a `HybridModel` is one symbol.
        predictions: The symbols of each depth of multi-token prediction.
        has_embedding, has_output: Whether the chunk reads token ids, and whether it computes logits.
    """

    parameters: Mapping[str, int]
    expert_parameters: int
    buffer_bytes: int
    layers: tuple[str, ...]
    predictions: tuple[str, ...]
    has_embedding: bool
    has_output: bool

    @property
    def num_parameters(self) -> int:
        """Return the number of all parameters."""
        return sum(self.parameters.values())

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers."""
        return len(self.layers)

    @property
    def num_moe_layers(self) -> int:
        """Return the number of MoE layers, those of multi-token prediction included."""
        return "".join(self.layers + self.predictions).count(Symbols.MOE)


@dataclass(frozen=True)
class ModelParameters:
    """The parameters of a model, and of each of its pipeline stages.

    Attributes:
        whole: The model as one rank without parallelism holds it.
        stages: The chunks of one rank of each pipeline stage.
        num_experts: Number of routed experts in a layer; None for a model without experts.
        topk: The most experts of a token; 0 for a model without experts.
        mean_experts: The mean number of experts that tokens use under the routing mask.
        mask_bytes: The bytes that the routing mask takes on the device in each chunk.
        padded_vocab_size: Number of rows of the embedding.
    """

    whole: Chunk
    stages: tuple[tuple[Chunk, ...], ...]
    num_experts: int | None
    topk: int
    mean_experts: float
    mask_bytes: int
    padded_vocab_size: int

    def active(self, experts_per_token: float) -> int:
        """Return how many parameters a token passes through, multi-token prediction left out.

        Args:
            experts_per_token: Number of experts that the token uses.
        """
        parts = self.whole.parameters
        unused = parts["routed experts"] * (1 - experts_per_token / (self.num_experts or 1))
        return round(self.whole.num_parameters - parts["multi-token prediction"] - unused)


def count_parameters(args: Namespace, config: MaskMoEModelConfig, mask: RoutingMask | None) -> ModelParameters:
    """Count the parameters of a model that is divided over ranks.

    The time does not depend on the number of ranks.

    Args:
        args: Arguments that Megatron has validated.
        config: The model's configuration; the file in its `routing_mask` is not read.
        mask: The routing mask; None if there is none, or none that can be read.
    """
    (whole,) = _count_stage(_on_one_rank(_changed(config, _LOCAL | _ONE_RANK)), _ALONE, stage=0)
    layout, local = Layout.from_args(args), _changed(config, _LOCAL)
    buffers: Iterable[torch.Tensor] = ()
    if mask is not None and args.num_experts:
        groups, pattern = ProcessGroupCollection(), args.hybrid_layer_pattern
        with suppress(UserError):  # a mask that does not fit is an error of its own
            buffers = VisibleExperts(config.transformer, mask, groups, hybrid_layer_pattern=pattern).buffers()
    topk = args.moe_router_topk if args.num_experts else 0
    return ModelParameters(
        whole,
        stages=tuple(_count_stage(local, layout, stage) for stage in range(layout.pipeline)),
        num_experts=args.num_experts,
        topk=topk,
        mean_experts=mean_experts_per_token(mask, topk, FeedForwardLayers.of_args(args)),
        mask_bytes=sum(buffer.nbytes for buffer in buffers),
        padded_vocab_size=args.padded_vocab_size,
    )


def _one_expert(num_local_experts: int, *args: Any, **kwargs: Any) -> SequentialMLP:
    """Build one expert in place of `num_local_experts` of the same shape, which would take as long to build."""
    return SequentialMLP(1, *args, **kwargs)


class _CoreAttention(torch.nn.Module):
    """The parameters of attention between its projections: none, or an offset for each head."""

    def __init__(
        self, *args: Any, config: TransformerConfig, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__()
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads))


class _Counting(StageBuilder):
    """Mixin that makes the model builder of a run fast: no mask file, one expert a layer and no core attention."""

    def visible_experts(self, pg_collection: ProcessGroupCollection, vp_stage: int | None) -> VisibleExperts:
        """Return the visible experts of a mask that fits every model."""
        config = self.config.transformer
        recipe = MaskRecipe.from_preset("smoe", config.num_moe_experts, num_layers=1, shared_table=True)
        mask = build_routing_mask(recipe, vocab_size=1)
        return VisibleExperts(config, mask, pg_collection, vp_stage)

    def layer_specs(self, visible_experts: VisibleExperts | None, vp_stage: int | None) -> dict[str, Any]:
        """Return the layer specifications of the run, with experts and core attention replaced."""
        replacements = {LocalExperts: _one_expert, TorchDotProductAttention: _CoreAttention}

        def substitute(node: Any) -> Any:
            return replacements.get(node, node) if isinstance(node, type) else node

        return map_spec(super().layer_specs(visible_experts, vp_stage), substitute)


def _changed(config: MaskMoEModelConfig, settings: Mapping[str, Any]) -> MaskMoEModelConfig:
    """Return a copy of a configuration in which some settings of the transformer are replaced."""
    transformer = copy.copy(config.transformer)
    vars(transformer).update(settings)
    return replace(config, megatron=replace(config.megatron, transformer=transformer))


def _on_one_rank(config: MaskMoEModelConfig) -> MaskMoEModelConfig:
    """Return a configuration whose pattern, if it has one, is not divided into pipeline stages."""
    megatron = config.megatron
    if not isinstance(megatron, HybridModelConfig):
        return config
    pattern = (megatron.hybrid_layer_pattern or "").replace(Symbols.PIPE, "")
    return replace(config, megatron=replace(megatron, hybrid_layer_pattern=pattern))


def _count_stage(config: MaskMoEModelConfig, layout: Layout, stage: int) -> tuple[Chunk, ...]:
    """Count the chunks of one rank of a pipeline stage, in process groups that cannot communicate."""
    # Data parallelism does not change the parameters, and Megatron lists all ranks, so leave it out. Megatron numbers
    # the ranks of a stage consecutively by default; the order does not change the parameters either.
    ranks = layout.ranks_step
    rank = stage * ranks // layout.pipeline
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            create_gloo_process_groups=False,
        )
        # Mamba layers fork the random-state tracker, whose states are real tensors, which `FakeTensorMode` refuses. The
        # inference tracker forks nothing.
        model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        interleaved = config.transformer.virtual_pipeline_model_parallel_size
        return tuple(_count_chunk(config, groups, chunk) for chunk in (range(interleaved) if interleaved else [None]))
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _count_chunk(config: MaskMoEModelConfig, groups: ProcessGroupCollection, vp_stage: int | None) -> Chunk:
    """Build one model chunk on tensors without storage, and count its parameters."""
    with FakeTensorMode():
        builder: Any = type("_CountingBuilder", (_Counting, config.get_builder_cls()), {})
        model = builder(config).build_model(groups, vp_stage=vp_stage)
    parameters = Counter(dict.fromkeys(PARTS, 0))
    experts_of_rank = (config.transformer.num_moe_experts or 0) // groups.ep.size()
    expert_parameters = 0
    for name, parameter in model.named_parameters():
        number, part = parameter.numel(), "layers without routed experts"
        if ".mlp.experts." in name:
            number, part = number * experts_of_rank, "routed experts"
            expert_parameters += number
        parameters[_PART_OF_MODULE.get(name.partition(".")[0], part)] += number
    layers, predictions = _symbols(model)
    return Chunk(
        parameters=dict(parameters),
        expert_parameters=expert_parameters,
        buffer_bytes=sum(_buffer_bytes(name, buffer, config) for name, buffer in model.named_buffers()),
        layers=layers,
        predictions=predictions,
        has_embedding=model.pre_process,
        has_output=model.post_process,
    )


def _symbols(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the symbols of each layer of a model chunk, and of each depth of its multi-token prediction."""
    if isinstance(model, HybridModel):
        depths = model.mtp_num_depths if model.mtp_process else 0
        decoder: Any = model.decoder
        return tuple(decoder.layer_type_list), (model.mtp_pattern or "",) * depths
    attention = Symbols.MLA if model.config.multi_latent_attention else Symbols.ATTENTION

    def symbols_of(layer: Any) -> str:
        return attention + (Symbols.MOE if isinstance(layer.mlp, MoELayer) else Symbols.MLP)

    # All depths can share one layer.
    predictions = [symbols_of(depth.mtp_model_layer) for depth in model.mtp.layers] if model.mtp_process else []
    return tuple(map(symbols_of, model.decoder.layers)), tuple(predictions[:1]) * (model.config.mtp_num_layers or 0)


def _buffer_bytes(name: str, buffer: torch.Tensor, config: MaskMoEModelConfig) -> int:
    """Return the bytes of a buffer in training; 0 for the routing mask, which is counted separately.

    `Float16Module` casts floating-point buffers to the type of the parameters. Routers keep their buffers in fp32.
    """
    if name.startswith("routing_mask."):
        return 0
    is_cast = buffer.is_floating_point() and ".router." not in name
    return buffer.numel() * (config.transformer.params_dtype if is_cast else buffer.dtype).itemsize
