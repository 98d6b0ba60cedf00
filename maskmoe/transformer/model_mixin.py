"""The part of a model that hands token ids and dispatch plans to its MoE layers, for any Megatron-Core model class."""

import logging
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank
from torch import Tensor

from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.kind import DispatchKind
from maskmoe.transformer.dispatch.plan import DispatchPlanner
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids, split_sequence, unpack_token_ids
from maskmoe.transformer.visible_experts import VisibleExperts

_logger = logging.getLogger(__name__)


class RoutesByTokenId(torch.nn.Module):
    """Mixin for a Megatron-Core model whose MoE layers route by token id.

    A model class calls `set_routing_mask` at the end of its `__init__`, and passes the result of `pack_for_layers` to
    its layers as `padding_mask`.
    """

    config: TransformerConfig
    pg_collection: ProcessGroupCollection
    share_embeddings_and_output_weights: bool
    mtp_process: bool
    post_process: bool
    output_layer: Any

    def set_routing_mask(self, visible_experts: VisibleExperts) -> None:
        """Register the routing mask, and prepare to plan dispatch if mask and settings allow plans.

        Args:
            visible_experts: the routing mask that the model's routers share.
        """
        self._drop_unused_output_weight()
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

    def pack_for_layers(self, input_ids: Tensor | None, padding_mask: Tensor | None) -> Tensor:
        """Return the tensor that the layers get as `padding_mask`: the ids of this rank's tokens, padding and plan.

        Args:
            input_ids: int64 [batch, sequence].
            padding_mask: bool [batch, sequence], True for padding; None: no token is padding.

        Raises:
            ValueError: no token ids, or a padding mask of another shape.
        """
        if input_ids is None:
            raise ValueError(
                f"{type(self).__name__} needs input_ids on every pipeline stage: its routers choose by token id"
            )
        packed = pack_token_ids(TokenIds(input_ids, padding_mask))
        if self.config.sequence_parallel:
            packed = split_sequence(packed, self.pg_collection.tp)
        if self._dispatch_planner is None:
            return packed
        token_ids = unpack_token_ids(packed)
        return pack_token_ids(TokenIds(token_ids.ids, token_ids.is_padding, self._dispatch_planner.plan(token_ids)))

    def _drop_unused_output_weight(self) -> None:
        """Drop the output layer's own weight where embeddings are tied and multi-token prediction holds an embedding.

        The output layer then uses the weight of that embedding. On a later pipeline stage, Megatron-Core also allocates
        a weight in the output layer, which is never used and makes saving a checkpoint fail. The model classes have no
        argument to prevent the allocation.
        """
        if self.share_embeddings_and_output_weights and self.mtp_process and self.post_process:
            self.output_layer.weight = None
