"""The GPT model that hands the token ids down to its routers."""

import logging

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import log_single_rank
from torch import Tensor

from maskmoe.transformer.dispatch.kind import DispatchKind
from maskmoe.transformer.dispatch_plan import DispatchPlanner, PlannedTokenIds
from maskmoe.transformer.moe_layer import dispatch_kind
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import pack_token_ids, take_part_of_sequence
from maskmoe.transformer.visible_experts import VisibleExperts

_logger = logging.getLogger(__name__)

# Where `GPTModel._preprocess` puts the padding mask among its outputs.
_PADDING_MASK = 5


class MaskMoEGPTModel(GPTModel):
    """`GPTModel` whose MoE layers route by token id.

    The ids ride on `padding_mask`, which Megatron-Core passes along with the hidden states through pipeline chunks,
    recomputation and multi-token prediction. So every pipeline stage must be given `input_ids`, also those without an
    embedding. A padding mask, bool [batch, sequence] with True for padding, may be given to all stages as well: the
    routers then leave padding out of their losses and of the counts behind the expert bias, as Megatron-Core's do.

    Args:
        visible_experts: the routing mask shared by the model's routers.
        other arguments: those of `GPTModel`.
    """

    def __init__(self, *args, visible_experts: VisibleExperts, **kwargs):
        super().__init__(*args, **kwargs)
        self.routing_mask = visible_experts
        if self.share_embeddings_and_output_weights and self.mtp_process and self.post_process:
            # With tied embeddings the output layer takes the weight of the embedding, which is here for multi-token
            # prediction. On a later pipeline stage it has an unused weight besides, and no checkpoint can be saved.
            self.output_layer.weight = None
        self._dispatch_planner = self._make_dispatch_planner()

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, padding_mask: Tensor | None = None, **kwargs):
        """As `GPTModel._preprocess`, with ids and padding of this rank's tokens in the place of `padding_mask`.

        Raises:
            ValueError: no token ids, or a padding mask of another shape.
        """
        if input_ids is None:
            raise ValueError("MaskMoEGPTModel needs input_ids on every pipeline stage: its routers choose by token id")
        outputs = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        token_ids = self._token_ids_of_this_rank(pack_token_ids(input_ids, padding_mask))
        if self._dispatch_planner is not None and padding_mask is None:
            token_ids = PlannedTokenIds.attach(token_ids, self._dispatch_planner.plan(token_ids))
        outputs[_PADDING_MASK] = token_ids
        return tuple(outputs)

    def _make_dispatch_planner(self) -> DispatchPlanner | None:
        """What plans the dispatch of all layers by the token ids; None if the mask or the settings do not allow it."""
        kind = dispatch_kind(self.config, self.pg_collection, self.routing_mask.is_rank_local)
        log_single_rank(_logger, logging.INFO, f"dispatch of tokens to experts: {kind.value}")
        if kind is not DispatchKind.PLANNED:
            return None
        # Those of multi-token prediction get other ids.
        routers = (module for module in self.modules() if isinstance(module, MaskMoERouter) and not module.is_mtp_layer)
        tables = {router.table for router in routers}
        return DispatchPlanner(self.routing_mask, self.config.moe_router_topk, tables, self.pg_collection.ep)

    def _token_ids_of_this_rank(self, packed: Tensor) -> Tensor:
        """What `pack_token_ids` made, [..., sequence / tp]: the part of the sequence that this rank holds."""
        return take_part_of_sequence(packed, self.pg_collection.tp) if self.config.sequence_parallel else packed
