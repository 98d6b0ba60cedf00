"""The top-k router that chooses only among the visible experts of each token id."""

from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    apply_biased_logits,
    apply_random_logits,
    apply_router_token_dropping,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.transformer.gathered_parameters import wait_for_parameters
from maskmoe.transformer.kernels import launching
from maskmoe.transformer.router_losses import attach_losses
from maskmoe.transformer.router_sums import AuxLossTokens, LossSums, MaskedLogitsSums
from maskmoe.transformer.routing_replay import REPLAYS, next_choice, record_choice, select_replayed
from maskmoe.transformer.routing_statistics import RoutingStatistics, sum_tokens
from maskmoe.transformer.selection import MaskedLogits, preference_scores, select_experts
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts, VisibleExpertsReference

if TYPE_CHECKING:
    from maskmoe.transformer.kernels.routing import Routed


class MaskMoERouter(TopKRouter):
    """The router of MaskMoE (arXiv 2407.09816): Megatron-Core's `TopKRouter` under a routing mask.

    1. Compute the logits as `TopKRouter` does.
    2. Set the logits of invisible experts to -inf.
    3. Attach the z-loss and the load-balancing losses, all over the masked logits.
    4. Select the top `min(k, V)` of the V visible experts (or of those in the chosen groups), or repeat a recorded
       choice, see `routing_replay`. Weigh the selected experts with the configured score function.
    5. [Optional] Drop the tokens that exceed the experts' capacity.

    On GPUs, one Triton kernel does steps 2 to 4, see `kernels.routing`. With float64 logits, a capacity factor or
    routing replay, plain torch does these steps, as on CPUs.

    In plain torch, if every expert is visible, outputs, losses and gradients are bit-equal to `TopKRouter`'s. The
    exception is the global load-balancing loss, which deviates on purpose, see `router_losses`. A token with one
    visible expert has weight exactly 1 (softmax scores) and sends no gradient to the router's weight.

    Args:
        config: the model's configuration.
        pg_collection: process groups of the MoE layer.
        is_mtp_layer: the router belongs to a layer of multi-token prediction.
        visible_experts: the model's routing mask.
        aux_loss_tokens: tokens that load-balancing losses count: `all`, or only `routable` ones (V ≥ 2).

    Attributes:
        statistics: sums over the tokens that were routed in training.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        visible_experts: VisibleExperts,
        aux_loss_tokens: AuxLossTokens = "all",
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.aux_loss_tokens: AuxLossTokens = aux_loss_tokens
        assert self.num_experts is not None
        self.statistics = RoutingStatistics(self.num_experts)
        self._mask = VisibleExpertsReference(visible_experts)

    @property
    def visible_experts(self) -> VisibleExperts:
        """The model's routing mask."""
        return self._mask.module

    @property
    def number_in_model(self) -> int:
        """The layer's number among the feed-forward layers of the model, counting from 1.

        `layer_number` starts again from 1 in multi-token prediction.
        """
        assert self.layer_number is not None
        return self.layer_number + (len(self.visible_experts.layers.decoder) if self.is_mtp_layer else 0)

    @property
    def table(self) -> int:
        """The table of the routing mask that this layer uses."""
        return self.visible_experts.table_of_layer(self.number_in_model)

    @property
    def is_recording(self) -> bool:
        """Whether this forward pass counts: not in evaluation, and with recomputation only the second pass."""
        return self.training and torch.is_grad_enabled()

    def forward(  # pyrefly: ignore[bad-override]  # the stock method takes a padding mask instead of token ids
        self, input: Tensor, token_ids: TokenIds, attaches_losses: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: hidden states [sequence, batch, hidden].
            token_ids: the ids [sequence, batch] of the same tokens.
            attaches_losses: attach the router's losses to the result; if False, the caller calls `attach_losses`.

        Returns:
            probs: [tokens, experts], the weights of the selected experts, 0 elsewhere.
            routing_map: bool [tokens, experts], the experts that each token is sent to: all selected experts, unless a
                capacity factor drops some.
        """
        self._maintain_float32_expert_bias()
        # Megatron-Core fails with a jitter of 0.
        logits = self.gating(self.apply_input_jitter(input) if self.config.moe_input_jitter_eps else input)
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        if self.config.moe_router_force_biased is not None:
            logits = apply_biased_logits(logits, self.config.moe_router_force_biased, self.layer_number)
        return self.routing(logits, token_ids, attaches_losses)

    def routing(  # pyrefly: ignore[bad-override]  # the stock method takes a padding mask instead of token ids
        self, logits: Tensor, token_ids: TokenIds, attaches_losses: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Choose among the visible experts by logits [sequence, batch, experts]; see `forward`."""
        attaches_losses = attaches_losses and self._has_losses()
        if self._runs_kernel(logits):
            return self._route_by_kernel(logits, token_ids, attaches_losses)
        masked = self._mask_logits(logits, token_ids)
        values, visible = masked.values, masked.visible.experts
        if attaches_losses:
            values = attach_losses(self, values, self._sums_of(masked), masked.num_sequences)

        # Select experts, then let Megatron-Core compute their weights.
        scores = preference_scores(masked, self.config.moe_router_pre_softmax, self.expert_bias)
        selected = self._select(scores, visible, token_ids)
        probs, routing_map = topk_routing_with_score_function(
            values,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            precomputed_indices=selected,
        )
        # If k > V, invisible experts with weight 0 fill up to k. Remove them from the map.
        routing_map = routing_map & visible
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )

        # Count the load for expert bias and statistics.
        is_real = masked.is_real
        self._apply_expert_bias(routing_map if is_real is None else routing_map & is_real.unsqueeze(-1))
        if self.is_recording:
            self.statistics.add_tokens(sum_tokens(masked, routing_map))
        return probs, routing_map

    def attach_losses(self, hidden_states: Tensor, token_ids: TokenIds) -> Tensor:
        """Attach the router's losses over this rank's tokens to hidden states; for tokens that other ranks route.

        Args:
            hidden_states: [sequence, batch, hidden].
            token_ids: the ids [sequence, batch] of the same tokens.

        Returns:
            [tokens, hidden], unchanged in value.
        """
        tokens = hidden_states.flatten(0, 1)
        if not self._has_losses():
            return tokens
        wait_for_parameters(self)
        logits = self.gating(hidden_states)
        if self._runs_kernel(logits):
            sums: LossSums | None = self._call_kernel(logits, token_ids, has_sums=True).sums
            assert sums is not None
        else:
            sums = self._sums_of(self._mask_logits(logits, token_ids))
        return attach_losses(self, tokens, sums, hidden_states.shape[1])

    def gating(self, input: Tensor) -> Tensor:
        """Compute logits as `TopKRouter.gating` does, and also for no tokens: an expert-parallel rank may receive none.

        The router's weight then gets a gradient of zeros, because data-parallel ranks wait for a gradient.
        """
        if input.numel() > 0:
            return super().gating(input)
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype or "", input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)

    def _select(self, scores: Tensor, visible: Tensor, token_ids: TokenIds) -> Tensor:
        """Select experts by scores, or repeat a recorded choice; arguments and result are those of `select_experts`."""
        num_groups, group_topk = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        replay = self.router_replay
        if replay is not None and replay.router_replay_action in REPLAYS:
            choice = next_choice(replay)
            return select_replayed(choice, visible, self.topk, bool(group_topk), token_ids, self.number_in_model)
        selected = select_experts(scores, visible, self.topk, num_groups, group_topk)
        if replay is not None:
            record_choice(replay, selected, visible)
        return selected

    def _mask_logits(self, logits: Tensor, token_ids: TokenIds) -> MaskedLogits:
        """Look up the visible sets of the tokens and mask the logits [sequence, batch, experts]."""
        visible = self.visible_experts(token_ids.ids.flatten(), self.table)
        return MaskedLogits.mask(logits, visible, token_ids, self.score_function)

    def _sums_of(self, logits: MaskedLogits) -> MaskedLogitsSums:
        """Return the sums for the losses."""
        return MaskedLogitsSums(logits, self.topk, self.aux_loss_tokens)

    def _runs_kernel(self, logits: Tensor) -> bool:
        """Return whether a kernel routes by these logits.

        The kernel supports neither float64 nor capacity factors, and neither records nor replays choices.
        """
        is_supported = (
            logits.dtype != torch.float64
            and self.config.moe_expert_capacity_factor is None
            and self.router_replay is None
        )
        return is_supported and launching.runs_kernels(logits)

    def _route_by_kernel(self, logits: Tensor, token_ids: TokenIds, attaches_losses: bool) -> tuple[Tensor, Tensor]:
        """Do what `routing` does in one kernel."""
        counts_load = self.enable_expert_bias and torch.is_grad_enabled()
        routed = self._call_kernel(logits, token_ids, attaches_losses or counts_load or self.is_recording)
        probs, sums = routed.probs, routed.sums
        if sums is not None:
            if attaches_losses:
                probs = attach_losses(self, probs, sums, logits.shape[1])
            if counts_load:
                assert self.local_tokens_per_expert is not None
                self.local_tokens_per_expert += sums.tokens_per_expert
            if self.is_recording:
                self.statistics.add_tokens(sums.statistics)
        return probs, routed.routing_map

    def _call_kernel(self, logits: Tensor, token_ids: TokenIds, has_sums: bool) -> "Routed":
        """Call `kernels.routing.route_tokens` with the settings of this router."""
        from maskmoe.transformer.kernels.routing import RoutingRule, route_tokens

        config = self.config
        rule = RoutingRule(
            topk=self.topk,
            score_function=self.score_function,
            pre_softmax=config.moe_router_pre_softmax,
            scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
            num_groups=config.moe_router_num_groups or 1,
            group_topk=config.moe_router_group_topk or 0,
            counts_all=self.aux_loss_tokens == "all",
            has_z_loss=bool(config.moe_z_loss_coeff),
        )
        num_sequences = logits.shape[1] if self.get_aux_loss_coeff("seq_aux_loss") > 0 else 1
        mask = self.visible_experts
        tables = mask.row_of_id[self.table], mask.visible_bits[self.table]
        return route_tokens(logits, token_ids, *tables, rule, self.expert_bias, num_sequences, has_sums)

    def _has_losses(self) -> bool:
        """Return whether this forward pass computes any loss."""
        return self.is_recording and (self.is_aux_loss_enabled() or bool(self.config.moe_z_loss_coeff))

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the expert bias in float32, as the overridden method does, and the token counts, too.

        bfloat16 cannot represent all whole numbers above 256.
        """
        super()._maintain_float32_expert_bias()
        for counts in (self.local_tokens_per_expert, self.global_tokens_per_expert, self.ga_steps):
            if counts is not None:
                counts.data = counts.data.float()
