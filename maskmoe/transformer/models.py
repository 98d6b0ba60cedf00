"""GPT and hybrid models: with MoE layers that route by token id, and without experts."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.plan import DispatchPlanner
from maskmoe.transformer.gathered_parameters import wait_for_convolutions
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids, split_sequence, to_arguments
from maskmoe.transformer.torch_modules.cross_entropy import ChunkedCrossEntropyMixin
from maskmoe.transformer.visible_experts import VisibleExperts

_logger = logging.getLogger(__name__)


class BaseModel(ChunkedCrossEntropyMixin):
    """Mixin of all models: a loss with less memory, and tied embeddings that can be saved."""

    mtp_process: bool
    output_layer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.share_embeddings_and_output_weights and self.mtp_process and self.post_process:
            # With tied embeddings, the output layer uses the weight of the embedding that multi-token prediction holds.
            # On a later pipeline stage, Megatron-Core also allocates a weight in the output layer, which is never used
            # and makes saving a checkpoint fail. The model classes have no argument to prevent the allocation.
            self.output_layer.weight = None
            # On a later stage, Megatron-Core would drop the gradient of the look-up of embeddings for the prediction,
            # because the output layer adds its part to the same buffer itself.
            shared: Any = self.shared_embedding_or_output_weight()
            shared.zero_out_wgrad = True


class RoutesByTokenId(torch.nn.Module):
    """Mixin for a Megatron-Core model whose MoE layers route by token id.

    A model class calls `set_routing_mask` at the end of its `__init__`.
    """

    config: TransformerConfig
    decoder: Any
    mtp: Any
    pg_collection: ProcessGroupCollection
    mtp_process: bool

    def set_routing_mask(self, visible_experts: VisibleExperts) -> None:
        """Register the model's routing mask, and prepare to plan dispatch if mask and settings allow plans.

        Raises:
            ValueError: A MoE layer does not route by this mask.
        """
        for name, layer in self.named_modules():
            router = getattr(layer, "router", None)
            if isinstance(layer, MoELayer) and getattr(router, "visible_experts", None) is not visible_experts:
                raise ValueError(
                    f"{name} does not route by the mask of the model: pass all layer specs through "
                    "with_maskmoe_modules(spec, config, visible_experts)"
                )
        self.routing_mask = visible_experts
        self._dispatch_planner: DispatchPlanner | None = None
        kind = choose_dispatch(self.config, self.pg_collection, visible_experts.is_rank_local)
        log_single_rank(_logger, logging.INFO, f"dispatch of tokens to experts: {kind.value}")
        self.dispatch_kind = kind
        if kind is DispatchKind.PLANNED:
            # Skip multi-token-prediction layers: their ids are shifted.
            routers = (m for m in self.modules() if isinstance(m, MaskMoERouter) and not m.is_mtp_layer)
            # All expert-parallel ranks have the same layers. So either all of them plan, or none does.
            if tables := {router.table for router in routers}:
                topk = self.config.moe_router_topk
                self._dispatch_planner = DispatchPlanner(visible_experts, topk, tables, self.pg_collection.ep)

    def ids_of_layers(self, input_ids: Tensor | None, padding_mask: Tensor | None) -> TokenIds:
        """Return the ids of this rank's tokens [batch, sequence], with padding and plan.

        Args:
            input_ids: int64 [batch, sequence].
            padding_mask: bool [batch, sequence], True for padding; None: no token is padding.

        Raises:
            ValueError: No token ids, or a padding mask of another shape.
        """
        if input_ids is None:
            raise ValueError(
                f"{type(self).__name__} needs input_ids on every pipeline stage: its routers choose by token id"
            )
        if padding_mask is not None:
            if padding_mask.shape != input_ids.shape:
                raise ValueError(
                    f"the padding mask has shape {list(padding_mask.shape)}, the token ids have {list(input_ids.shape)}"
                )
            padding_mask = padding_mask.bool()  # `~`, which inverts the mask later, is wrong for integers
        if self.config.sequence_parallel:
            tp_group = self.pg_collection.tp
            input_ids = split_sequence(input_ids, tp_group)
            padding_mask = None if padding_mask is None else split_sequence(padding_mask, tp_group)
        token_ids = TokenIds(input_ids, padding_mask)
        if self._dispatch_planner is not None:
            token_ids = replace(token_ids, plan=self._dispatch_planner.plan(token_ids))
        return token_ids


class DenseGPTModel(BaseModel, GPTModel):
    """`GPTModel` without experts, with the loss of `MaskMoEGPTModel`."""


class MaskMoEGPTModel(BaseModel, RoutesByTokenId, GPTModel):
    """`GPTModel` whose MoE layers route by token id.

    Every pipeline stage must be given `input_ids`, also stages without an embedding. A padding mask, bool [batch,
    sequence] with True for padding, can be given to all stages as well: the routers then exclude padding from their
    losses and from the counts behind the expert bias, as Megatron-Core's routers do.
    The routers share the mask `visible_experts`; the remaining arguments are those of `GPTModel`.
    """

    def __init__(self, *args: Any, visible_experts: VisibleExperts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_routing_mask(visible_experts)

    def build_schedule_plan(self, *args: Any, **kwargs: Any) -> TransformerModelChunkSchedulePlan:
        """Return the plan of a micro-batch for `--overlap-moe-expert-parallel-comm`; arguments as for `forward`."""
        plan: Any = super().build_schedule_plan(*args, **kwargs)
        for number in range(plan.num_layers()):
            of_layer = plan.get_layer(number)
            layer = getattr(of_layer.layer, "mtp_model_layer", of_layer.layer)
            if isinstance(layer.mlp, MaskMoELayer):
                layer.mlp.give_ids_to(of_layer.pre_dispatch_computation)
        return plan

    def _preprocess(self, input_ids: Tensor, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple:
        """Prepare a stage as `GPTModel` does; return all layers' token ids, packed, in place of the padding mask."""
        token_ids = self.ids_of_layers(input_ids, padding_mask)
        results = super()._preprocess(input_ids, *args, padding_mask=padding_mask, **kwargs)
        return (*results[:5], pack_token_ids(token_ids), *results[6:])


class BaseHybridModel(HybridModel):
    """`HybridModel` with what Megatron-Core leaves out: settings of rotary embeddings, and waiting for convolutions.

    Rotary embeddings can be scaled as Llama 3 does, and interleaved, like those of `GPTModel`. Gated delta nets wait
    until the parameters of their convolution are gathered, see `wait_for_convolutions`.
    """

    def __init__(self, *args: Any, rope_scaling: bool = False, rope_scaling_factor: float = 8.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rope: Any = getattr(self, "rotary_pos_emb", None)
        if rope is not None:
            rope.rotary_interleaved = self.config.rotary_interleaved
        if rope_scaling and self.position_embedding_type == "rope" and rope is not None:
            rope.inv_freq = rope._apply_scaling(rope.inv_freq, factor=rope_scaling_factor)
        wait_for_convolutions(self)


class DenseHybridModel(BaseModel, BaseHybridModel):
    """`HybridModel` without experts, with the loss of `MaskMoEHybridModel`."""


class MaskMoEHybridModel(BaseModel, RoutesByTokenId, BaseHybridModel):
    """`HybridModel` whose MoE layers route by token id.

    Every pipeline stage must be given `input_ids`, and can be given a padding mask, as for `MaskMoEGPTModel`. With
    equal weights, a model and its twin of the other class compute the same bits: a transformer layer of
    `MaskMoEGPTModel` is two symbols of the pattern, attention and MLP or MoE layer.
    """

    def __init__(self, *args: Any, visible_experts: VisibleExperts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._number_moe_layers()
        self.set_routing_mask(visible_experts)

    def forward(self, input_ids: Tensor, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run one pipeline stage as the stock model does, with token ids for all MoE layers; see `ids_of_layers`."""
        token_ids = self.ids_of_layers(input_ids, padding_mask)
        with ExitStack() as hooks:
            hooks.enter_context(_giving(self.decoder, to_arguments(token_ids, type(self.decoder))))
            if self.mtp_process:
                # `HybridModel` passes no padding mask to these layers, and their `input_ids` are for embeddings only.
                hooks.enter_context(_giving(self.mtp, {"padding_mask": pack_token_ids(token_ids)}))
            return super().forward(input_ids, *args, padding_mask=padding_mask, **kwargs)

    def _number_moe_layers(self) -> None:
        """Number each MoE layer among the feed-forward layers of decoder or multi-token prediction, as in the twin.

        `HybridModel` counts all symbols, and starts from 1 again in each depth of multi-token prediction.
        """
        parsed = parse_hybrid_pattern(self.hybrid_layer_pattern)
        _number(self.decoder.layers, (parsed.main_pattern or "").replace(Symbols.PIPE, ""), before=0)
        pattern = parsed.mtp_pattern or ""
        predictions: Any = self.mtp.layers if self.mtp_process else ()
        for depth, prediction in enumerate(predictions):
            _number(prediction.mtp_model_layer.layers, pattern, before=depth * _num_feed_forward(pattern))


def _number(layers: Iterable[Any], pattern: str, before: int) -> None:
    """Number the MoE layers among the feed-forward layers of a pattern, which follow `before` others."""
    for layer in layers:
        if isinstance(getattr(layer, "mlp", None), MoELayer):  # Mamba layers have none
            layer.mlp.set_layer_number(before + _num_feed_forward(pattern[: layer.layer_number]))


def _num_feed_forward(pattern: str) -> int:
    """Return the number of MLPs and MoE layers in a pattern."""
    return len(FeedForwardLayers.of_pattern(pattern).decoder)


def _giving(block: torch.nn.Module, arguments: dict[str, Tensor | None]) -> RemovableHandle:
    """Give a block of layers these arguments whenever it is called, inside a `with` block."""

    def give(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | arguments

    return block.register_forward_pre_hook(give, with_kwargs=True)
