"""A top-k router that chooses among the visible experts of each token's id only."""

from collections.abc import Callable
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.transformer.losses import masked_load_balancing_loss, masked_z_loss
from maskmoe.transformer.visible_experts import VisibleExperts, VisibleSets

AuxLossTokens = Literal["all", "routable"]


class _VisibleTopK:
    """Selects by score among the visible experts, in the place where `RouterReplay` would select.

    Masked logits alone do not suffice. Score functions map -inf to 0, which an expert bias can lift above the score of
    a visible expert, and to which that score rounds where its logit is far below 0 or below the largest one.

    Args:
        invisible: bool [tokens, experts].
    """

    def __init__(self, invisible: Tensor):
        self.invisible = invisible

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: None, group_topk: None, compute_topk: Callable
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [tokens, k] of the selected experts; invisible ones only after all visible ones."""
        _, indices = compute_topk(scores.masked_fill(self.invisible, float("-inf")), topk)
        return scores.gather(1, indices), indices


class MaskMoERouter(TopKRouter):
    """The router of MaskMoE (arXiv 2407.09816): Megatron-Core's `TopKRouter` under a routing mask.

    1. Compute the logits as `TopKRouter` does.
    2. Set the logits of invisible experts to -inf.
    3. Select the top `min(k, V)` of the V visible experts and weigh them with the configured score function.
    4. Attach z-loss and load-balancing loss, both over the masked logits.

    With every expert visible, outputs, losses and gradients are bit-equal to `TopKRouter`'s. A token with one visible
    expert has weight exactly 1 (softmax scores) and sends no gradient to the router's weight.

    Args:
        config: the model's configuration.
        pg_collection: process groups of the MoE layer.
        is_mtp_layer: whether the layer belongs to multi-token prediction.
        visible_experts: the routing mask, shared by all routers of the model.
        aux_loss_tokens: average the load-balancing loss over "all" tokens, or over the "routable" ones (V >= 2),
            the only ones that can move.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        visible_experts: VisibleExperts,
        aux_loss_tokens: AuxLossTokens = "all",
    ):
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.aux_loss_tokens = aux_loss_tokens
        # In a tuple, so that the module, which belongs to the model, is not registered once more in each router.
        self._visible_experts = (visible_experts,)

    @property
    def visible_experts(self) -> VisibleExperts:
        return self._visible_experts[0]

    def forward(self, input: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: hidden states [sequence, batch, hidden].
            token_ids: int64 [sequence, batch], the ids of the same tokens.

        Returns:
            probs: [tokens, experts], the weights of the selected experts, 0 elsewhere.
            routing_map: bool [tokens, experts], the selected experts: `min(k, V)` for each token.
        """
        # TopKRouter.forward hands its second argument to `routing` untouched.
        return super().forward(input, padding_mask=token_ids)

    def routing(self, logits: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Choose among the visible experts.

        Args:
            logits: [sequence, batch, experts].
            padding_mask: the token ids, see `forward`; the name is that of the method this one overrides.
        """
        logits = logits.view(-1, self.num_experts)  # [tokens, experts]
        visible = self.visible_experts(padding_mask.reshape(-1), self._table)
        invisible = ~visible.experts
        logits = logits.masked_fill(invisible, float("-inf"))
        logits = self._attach_z_loss(logits, visible)

        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=_VisibleTopK(invisible),
        )
        # Where k > V, top-k has also picked invisible experts, with weight 0.
        routing_map = routing_map & visible.experts

        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs = self._attach_load_balancing_loss(probs, logits, visible)
        self._apply_expert_bias(routing_map)
        return probs, routing_map

    def _maintain_float32_expert_bias(self) -> None:
        """As the method it overrides, and keeps the token counts in float32, too: bfloat16 rounds them from 257 on."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    @property
    def _table(self) -> int:
        layer_number = self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)
        return self.visible_experts.table_of_layer(layer_number)

    def _attach_z_loss(self, logits: Tensor, visible: VisibleSets) -> Tensor:
        """`TopKRouter.apply_z_loss` over the visible logits [tokens, experts]."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not self.training or not torch.is_grad_enabled():
            return logits
        z_loss = masked_z_loss(logits, visible.routable, coeff / self.tp_cp_group.size())
        return self.attach_and_log_load_balancing_loss(logits, coeff, z_loss, "z_loss", self.tp_cp_group)

    def _attach_load_balancing_loss(self, probs: Tensor, logits: Tensor, visible: VisibleSets) -> Tensor:
        """`TopKRouter._apply_aux_loss` over the masked logits [tokens, experts]."""
        coeff = self.get_aux_loss_coeff("aux_loss")
        routing_map, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        routing_map = routing_map & visible.experts

        if self.aux_loss_tokens == "routable" and visible.routable is not None:
            counted = visible.routable
            routing_map = routing_map & counted.unsqueeze(-1)
            scores = scores * counted.unsqueeze(-1)
            local_counts = torch.cat([routing_map.sum(dim=0), counted.sum().view(1)])
            counts = reduce_from_tensor_model_parallel_region(local_counts, self.tp_cp_group)
            tokens_per_expert, num_tokens = counts[:-1], counts[-1]
        else:
            tokens_per_expert = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
            num_tokens = logits.shape[0] * self.tp_cp_group.size()

        loss = masked_load_balancing_loss(scores, tokens_per_expert, num_tokens, self.num_experts, coeff)
        return self.attach_and_log_load_balancing_loss(
            probs, coeff, loss, "load_balancing_loss", self.tp_cp_group, valid_token_count=logits.shape[0]
        )
