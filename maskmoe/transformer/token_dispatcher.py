"""All-to-all dispatch of tokens that differ in their number of experts."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class MaskMoEAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """`MoEAlltoAllTokenDispatcher` for any number of selected experts per token.

    The stock dispatcher sends `tokens * k` rows. Under a routing mask a token with fewer than k visible experts uses
    fewer, so the rows are counted from the routing map. On a GPU that costs one wait for the count before the first
    permutation; it is spared where every token is known to select k experts.

    Args:
        num_local_experts: experts on this rank.
        local_expert_indices: their indices among all experts, contiguous.
        config: the model's configuration.
        pg_collection: process groups of the MoE layer.
        min_visible: the smallest number of visible experts of any id.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        min_visible: int,
    ):
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        # Only some of the visible experts are in the groups that a token is limited to.
        enough_visible = config.num_moe_experts if config.moe_router_group_topk else config.moe_router_topk
        # Padded to capacity, the number of rows is fixed.
        self.counts_rows = min_visible < enough_visible and not self.drop_and_pad

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As the method it overrides: from routing_map, bool [tokens, experts], to the tokens of each local expert."""
        tokens_per_local_expert = super().preprocess(routing_map)
        if self.counts_rows:
            alone = self.ep_size == 1 and self.tp_size == 1
            self.num_out_tokens = tokens_per_local_expert.sum() if alone else self.input_splits.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert
