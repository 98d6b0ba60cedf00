"""Stock dispatch: Megatron-Core's own token dispatchers, for any number of selected experts per token."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, cast

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.gathered_parameters import wait_for_parameters
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds


class StockDispatcher:
    """Dispatches by Megatron's own token dispatcher: all-to-all, all-gather or flex.

    The steps of `MoELayer` itself are used, so that its options work unchanged: shared experts that overlap with
    communication, latent projections, padding to capacity, expert tensor parallelism. Megatron's token dispatcher keeps
    the state between dispatch and combine.
    The layer's `token_dispatcher` is set to Megatron's dispatcher, which the layer's steps use.
    """

    def __init__(self, layer: MoELayer, pg_collection: ProcessGroupCollection) -> None:
        self._layer = layer
        self._megatron = layer.token_dispatcher = _build_token_dispatcher(layer, pg_collection)
        if layer.use_shared_expert and layer.shared_expert_overlap:
            self._megatron.set_shared_experts(layer.shared_experts)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Do nothing yet, because Megatron computes shared experts before it routes; see `Dispatcher`."""
        return partial(self._dispatch, hidden_states, token_ids, router)

    def _dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Choose experts and send one row for each."""
        layer = self._layer
        probs, routing_map = router(hidden_states, token_ids)
        if layer.shared_expert_overlap and layer.shared_experts is not None:
            # The overlap calls the steps of the shared experts, but not the module that holds the weight of the gate.
            wait_for_parameters(layer.shared_experts)
        rows, weights = layer.preprocess(hidden_states, probs, routing_map)  # pyrefly: ignore[not-iterable]
        rows, weights = layer.dispatch(rows, weights)
        postprocess: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._megatron.dispatch_postprocess  # pyrefly: ignore[bad-assignment]
        return Dispatched(*postprocess(rows, weights), combine=self._combine)

    def _combine(self, expert_output: Tensor) -> Tensor:
        """Send outputs back and add them up; see `Dispatched`."""
        output = self._megatron.combine_preprocess(expert_output)
        return self._layer.postprocess(self._layer.combine(output), None)


def _build_token_dispatcher(layer: MoELayer, pg_collection: ProcessGroupCollection) -> MoETokenDispatcher:
    """Build Megatron's dispatcher for any number of selected experts per token."""
    common = (layer.num_local_experts, layer.local_expert_indices, layer.config, pg_collection)
    match layer.config.moe_token_dispatcher_type:
        case "alltoall":
            min_visible = cast(MaskMoERouter, layer.router).visible_experts.min_visible
            return MaskMoEAlltoAllTokenDispatcher(*common, min_visible=min_visible)
        case "flex":
            return MoEFlexTokenDispatcher(*common)
        case _:
            # The all-gather dispatcher reads only the routing map. Transformer Engine's permutation of all gathered
            # tokens fails if none of them uses an expert of this rank.
            config = copy(layer.config)
            config.moe_permute_fusion = False
            return MoEAllGatherTokenDispatcher(
                layer.num_local_experts, layer.local_expert_indices, config, pg_collection
            )


class MaskMoEAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """`MoEAlltoAllTokenDispatcher` for any number of selected experts per token.

    Megatron's class sends `tokens * k` rows. Under a routing mask, a token with fewer than k visible experts uses fewer
    rows, so this class counts the rows of the routing map. On a GPU, the host waits for the count before the first
    permutation. The count is skipped if every token is known to select k experts.
    `min_visible` is the smallest number of visible experts of any id.
    """

    def __init__(self, *args: Any, min_visible: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        # Group-limited routing may leave only some of the visible experts, so only V = N guarantees k of them.
        assert config.num_moe_experts is not None
        enough_visible = config.num_moe_experts if config.moe_router_group_topk else config.moe_router_topk
        # With padding to capacity, the number of rows is fixed.
        self.counts_rows = min_visible < enough_visible and not self.drop_and_pad

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count rows and split sizes; return the tokens of each local expert."""
        tokens_per_local_expert = super().preprocess(routing_map)
        if self.counts_rows:
            alone = self.ep_size == 1 and self.tp_size == 1
            counts = tokens_per_local_expert if alone else self.input_splits
            assert counts is not None
            self.num_out_tokens = counts.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert
