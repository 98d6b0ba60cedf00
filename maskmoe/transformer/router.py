"""A top-k router that chooses among the visible experts of each token's id only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.transformer.losses import (
    Assignments,
    ExpertLoad,
    assign_for_balancing,
    masked_load_balancing_loss,
    masked_z_loss,
    measure_load,
)
from maskmoe.transformer.routing_statistics import RoutingStatistics
from maskmoe.transformer.token_ids import unpack_token_ids
from maskmoe.transformer.visible_experts import VisibleExperts, VisibleSets

AuxLossTokens = Literal["all", "routable"]


@dataclass(frozen=True)
class RoutingRequest:
    """What `MaskMoERouter.forward` hands on to `routing`.

    Attributes:
        token_ids: int64 [sequence, batch], or ids and padding, [2, sequence, batch], see `pack_token_ids`.
        attaches_losses: whether the router's losses are attached to what is returned.
    """

    token_ids: Tensor
    attaches_losses: bool


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
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, compute_topk: Callable
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [tokens, k] of the selected experts; invisible ones only after all that may be selected.

        With groups, those are the visible experts of the chosen groups.
        """
        candidates = scores.masked_fill(self.invisible, float("-inf"))
        if group_topk:
            outside = _outside_chosen_groups(candidates, topk, num_groups, group_topk)
            # What fills up the top k must be invisible, for it is told from a selected expert by that. The chosen
            # groups hold k experts or more, so they hold invisible ones to fill up with.
            candidates = candidates.masked_fill(self.invisible, torch.finfo(scores.dtype).min)
            candidates = candidates.masked_fill(outside, float("-inf"))
        _, indices = compute_topk(candidates, topk)
        return scores.gather(1, indices), indices


def _outside_chosen_groups(scores: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """The experts outside the groups that group-limited routing (DeepSeek-V3, arXiv 2412.19437) chooses for a token.

    A group's score is the sum of its `topk / group_topk` largest scores, of fewer if fewer of its experts are visible.
    A group without a visible expert is chosen only where there are not enough others.

    Args:
        scores: [tokens, experts], -inf for invisible experts.
        topk: k.
        num_groups: groups of equal size.
        group_topk: groups chosen for a token.

    Returns:
        bool [tokens, experts].
    """
    num_tokens, num_experts = scores.shape
    best = scores.view(num_tokens, num_groups, -1).topk(topk // group_topk, dim=-1).values
    invisible = best == float("-inf")
    group_scores = best.masked_fill(invisible, 0.0).sum(dim=-1)  # [tokens, groups]
    group_scores = group_scores.masked_fill(invisible.all(dim=-1), float("-inf"))
    chosen_groups = group_scores.topk(group_topk, dim=-1, sorted=False).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen_groups, False)
    return outside.repeat_interleave(num_experts // num_groups, dim=1)


class MaskMoERouter(TopKRouter):
    """The router of MaskMoE (arXiv 2407.09816): Megatron-Core's `TopKRouter` under a routing mask.

    1. Compute the logits as `TopKRouter` does.
    2. Set the logits of invisible experts to -inf.
    3. Select the top `min(k, V)` of the V visible experts, or of those in the chosen groups, and weigh them with the
       configured score function.
    4. [Optional] Drop what exceeds the experts' capacity.
    5. Attach z-loss and load-balancing losses, all over the masked logits.

    With every expert visible, outputs, losses and gradients are bit-equal to `TopKRouter`'s, but for the global
    load-balancing loss where that one depends on the number of ranks or on padding, see `_apply_global_aux_loss`. A
    token with one visible expert has weight exactly 1 (softmax scores) and sends no gradient to the router's weight.

    Args:
        config: the model's configuration.
        pg_collection: process groups of the MoE layer.
        is_mtp_layer: whether the layer belongs to multi-token prediction.
        visible_experts: the routing mask, shared by all routers of the model.
        aux_loss_tokens: average the load-balancing losses over "all" tokens, or over the "routable" ones (V >= 2),
            the only ones that can move. Padding is left out of both.

    Attributes:
        statistics: of the tokens routed in training.
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
        self.statistics = RoutingStatistics(config.num_moe_experts)
        # In a tuple, so that the module, which belongs to the model, is not registered once more in each router.
        self._visible_experts = (visible_experts,)

    @property
    def visible_experts(self) -> VisibleExperts:
        return self._visible_experts[0]

    def forward(self, input: Tensor, token_ids: Tensor, attaches_losses: bool = True) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: hidden states [sequence, batch, hidden].
            token_ids: int64 [sequence, batch], the ids of the same tokens; or ids and padding, [2, sequence, batch],
                see `pack_token_ids`.
            attaches_losses: attach z-loss and load-balancing losses; else that is left to `attach_losses`.

        Returns:
            probs: [tokens, experts], the weights of the selected experts, 0 elsewhere.
            routing_map: bool [tokens, experts], the experts that the token is sent to: all selected ones unless there
                is a capacity factor.
        """
        # TopKRouter.forward hands its second argument to `routing` untouched.
        return super().forward(input, padding_mask=RoutingRequest(token_ids, attaches_losses))

    def routing(self, logits: Tensor, padding_mask: RoutingRequest) -> tuple[Tensor, Tensor]:
        """Choose among the visible experts.

        Args:
            logits: [sequence, batch, experts].
            padding_mask: the request; the name is that of the method this one overrides.
        """
        request, num_sequences = padding_mask, logits.shape[1]
        logits, visible, real = self._mask_logits(logits, request.token_ids)
        if request.attaches_losses:
            logits = self._attach_z_loss(logits, logits, visible, real)

        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=_VisibleTopK(~visible.experts),
        )
        # Where k > V, top-k has also picked invisible experts, with weight 0.
        routing_map = routing_map & visible.experts
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )

        if request.attaches_losses:
            probs = self._attach_load_balancing_losses(probs, logits, visible, real, num_sequences)
        self._apply_expert_bias(routing_map if real is None else routing_map & real.unsqueeze(-1))
        if self._is_recorded():
            self.statistics.count_tokens(logits, routing_map, visible.routable, real, self.score_function)
        return probs, routing_map

    def gating(self, input: Tensor) -> Tensor:
        """As the method it overrides, and for no tokens, too: an expert-parallel rank may receive none.

        The weight still gets a gradient, of zeros: data-parallel ranks wait for one.
        """
        if input.numel() > 0:
            return super().gating(input)
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)

    def attach_losses(self, activation: Tensor, input: Tensor, token_ids: Tensor) -> Tensor:
        """Attach the router's losses over tokens to what was made of them, where `forward` has not done it.

        Args:
            activation: [tokens, features].
            input: hidden states [sequence, batch, hidden] of the tokens.
            token_ids: int64 [sequence, batch].
        """
        if not self._has_losses():
            return activation
        logits = self.gating(input)
        num_sequences = logits.shape[1]
        logits, visible, real = self._mask_logits(logits, token_ids)
        activation = self._attach_z_loss(activation, logits, visible, real)
        return self._attach_load_balancing_losses(activation, logits, visible, real, num_sequences)

    def _mask_logits(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, VisibleSets, Tensor | None]:
        """Logits [tokens, experts] with -inf for invisible experts, what is visible, and bool [tokens] what is real."""
        token_ids, is_padding = unpack_token_ids(token_ids)
        real = None if is_padding is None else ~is_padding.reshape(-1)
        visible = self.visible_experts(token_ids.reshape(-1), self.table)
        logits = logits.view(-1, self.num_experts).masked_fill(~visible.experts, float("-inf"))
        return logits, visible, real

    def _is_recorded(self) -> bool:
        """Whether this forward pass counts: evaluation does not, and with recomputation only the second one does."""
        return self.training and torch.is_grad_enabled()

    def _has_losses(self) -> bool:
        return self._is_recorded() and (self.is_aux_loss_enabled() or self.config.moe_z_loss_coeff is not None)

    def _maintain_float32_expert_bias(self) -> None:
        """As the method it overrides, and keeps the token counts in float32, too: bfloat16 rounds them from 257 on."""
        super()._maintain_float32_expert_bias()
        for counts in (self.local_tokens_per_expert, self.global_tokens_per_expert, self.ga_steps):
            if counts is not None:
                counts.data = counts.data.float()

    @property
    def number_in_model(self) -> int:
        """The layer's number, counting from 1; layers of multi-token prediction follow the decoder's."""
        return self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)

    @property
    def table(self) -> int:
        """Which table of the routing mask is this layer's."""
        return self.visible_experts.table_of_layer(self.number_in_model)

    def _attach_z_loss(self, activation: Tensor, logits: Tensor, visible: VisibleSets, real: Tensor | None) -> Tensor:
        """`TopKRouter.apply_z_loss` over the visible logits [tokens, experts]; real: bool [tokens], None: all."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not self._has_losses():
            return activation
        z_loss = masked_z_loss(logits, visible.routable, real, coeff / self.tp_cp_group.size())
        return self.attach_and_log_load_balancing_loss(
            activation,
            coeff,
            z_loss,
            "z_loss",
            self.tp_cp_group,
            valid_token_count=None if real is None else real.sum(),
        )

    def _attach_load_balancing_losses(
        self, activation: Tensor, logits: Tensor, visible: VisibleSets, real: Tensor | None, num_sequences: int
    ) -> Tensor:
        """The losses of `TopKRouter` whose coefficients are not 0, over the masked logits [tokens, experts].

        Args:
            activation: [tokens, features], what they are attached to.
            real: bool [tokens], those that are no padding; None: all.
            num_sequences: sequences in the micro-batch.
        """
        if not self._has_losses() or not self.is_aux_loss_enabled():
            return activation
        counted = real
        if self.aux_loss_tokens == "routable" and visible.routable is not None:
            counted = visible.routable if real is None else visible.routable & real
        assignments = assign_for_balancing(logits, visible.experts, counted, self.topk, self.score_function)
        num_real = len(activation) if real is None else real.sum()
        activation = self._apply_local_loss("aux_loss", activation, assignments, num_real)
        activation = self._apply_local_loss("seq_aux_loss", activation, assignments, num_real, num_sequences)
        return self._apply_global_aux_loss(activation, assignments, num_real)

    def _apply_local_loss(
        self,
        loss_type: str,
        activation: Tensor,
        assignments: Assignments,
        num_real: int | Tensor,
        num_sequences: int = 1,
    ) -> Tensor:
        """Balance the load of each micro-batch, taken as one sequence, or of each of its sequences."""
        coeff = self.get_aux_loss_coeff(loss_type)
        if coeff == 0:
            return activation
        load = measure_load(assignments, self.topk, self.tp_cp_group, num_sequences)
        loss = masked_load_balancing_loss(assignments.scores, load, self.topk, self.num_experts, coeff) / num_sequences
        name = loss_type.replace("aux_loss", "load_balancing_loss")
        return self.attach_and_log_load_balancing_loss(
            activation, coeff, loss, name, self.tp_cp_group, valid_token_count=num_real
        )

    def _apply_global_aux_loss(self, activation: Tensor, assignments: Assignments, num_real: int | Tensor) -> Tensor:
        """Balance the load of all data-parallel ranks and of the step's micro-batches so far.

        Gradients are averaged over data-parallel ranks, but this loss is a sum over them. Megatron-Core 0.19.2 leaves
        it so, whereby the same coefficient weighs less the more ranks there are (its issue 3672), and divides the load
        of earlier micro-batches by the number of tokens in this one (its issue 7213).
        """
        coeff = self.get_aux_loss_coeff("global_aux_loss")
        if coeff == 0:
            return activation
        load = self._accumulate_load(measure_load(assignments, self.topk, self.tp_dp_cp_group))
        loss = masked_load_balancing_loss(assignments.scores, load, self.topk, self.num_experts, coeff)
        dp_size = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        return self.attach_and_log_load_balancing_loss(
            activation,
            coeff * dp_size,
            loss * dp_size,
            "global_load_balancing_loss",
            self.tp_dp_cp_group,
            needs_dp_avg=False,
            valid_token_count=num_real,
        )

    def _accumulate_load(self, load: ExpertLoad) -> ExpertLoad:
        """The mean load of the step's micro-batches so far, as if each had as many tokens as this one.

        The buffers are not saved: Megatron-Core sets them to 0 at the end of every step.
        """
        self.global_tokens_per_expert += load.tokens_per_expert
        self.ga_steps += 1
        total = self.global_tokens_per_expert.double().sum().clamp(min=1)
        scale = (self.topk * load.num_tokens * self.ga_steps.double() / total).float()
        return ExpertLoad(self.global_tokens_per_expert / self.ga_steps * scale, load.num_tokens)
