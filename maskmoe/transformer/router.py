"""The top-k router that chooses only among the visible experts of each token id."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import apply_biased_logits, apply_random_logits, router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.transformer.router_losses import attach_losses
from maskmoe.transformer.routing import AuxLossTokens, LossRule, route_tokens
from maskmoe.transformer.routing_replay import REPLAYS, next_choice, record_choice, select_replayed
from maskmoe.transformer.routing_statistics import RoutingStatistics, RoutingSums
from maskmoe.transformer.selection import RoutingRule
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import MaskTable, VisibleExperts

BALANCING_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
"""Megatron's names of the load-balancing losses, in the order in which the losses are attached."""

# The CPU adapter replaces `torch.compile`, so the function runs as it is on a CPU.
_route_tokens = torch.compile(route_tokens, dynamic=True)


def check_router_settings(config: TransformerConfig) -> None:
    """Raise `UserError` if a setting of a model with experts contradicts a routing mask."""
    balancing = config.moe_router_load_balancing_type
    balancing = {balancing} if isinstance(balancing, str) else {*balancing}
    topk, num_experts = config.moe_router_topk, config.num_moe_experts or 0
    groups, chosen = config.moe_router_num_groups or 0, config.moe_router_group_topk or 0
    contradictions = {
        "--moe-router-topk must be at most --num-experts": topk > num_experts,
        "--moe-router-group-topk must be at most --moe-router-topk, and the chosen groups need as many experts": (
            groups * chosen > 0 and not chosen <= topk <= chosen * (num_experts // groups)
        ),
        "--moe-router-topk-scaling-factor must be above 0: a negative weight marks experts that are not selected": (
            config.moe_router_topk_scaling_factor is not None and config.moe_router_topk_scaling_factor <= 0
        ),
        "--moe-apply-probs-on-input needs --moe-router-topk 1, and --disable-bias-linear beside padding to capacity": (
            config.moe_apply_probs_on_input
            and (topk > 1 or (config.moe_pad_expert_input_to_capacity and config.add_bias_linear))
        ),
        "--moe-router-load-balancing-type sinkhorn and quantile_balancing balance over invisible experts as well": (
            not {"sinkhorn", "quantile_balancing"}.isdisjoint(balancing)
        ),
        "--moe-router-fusion and --transformer-impl inference_optimized bring routers that ignore the routing mask": (
            config.moe_router_fusion or config.transformer_impl == "inference_optimized"
        ),
        "--moe-router-padding-for-quantization would send tokens to invisible experts": (
            config.moe_router_padding_for_quantization
        ),
    }
    for error, is_contradiction in contradictions.items():
        if is_contradiction:
            raise UserError(error)


class MaskMoERouter(TopKRouter):
    """The router of MaskMoE (arXiv 2407.09816): Megatron-Core's `TopKRouter` under a routing mask.

    1. Compute the logits as `TopKRouter` does.
    2. Set the logits of invisible experts to -inf.
    3. Attach the z-loss and the load-balancing losses, all over the masked logits.
    4. Select the top `min(k, V)` of the V visible experts (or of those in the chosen groups), or repeat a recorded
       choice, see `routing_replay`. Weigh the selected experts with the configured score function.
    5. [Optional] Drop the tokens that exceed the experts' capacity.

    `route_tokens` does steps 2 to 5; `attach_losses` computes the losses from its sums. On GPUs,
    `torch.compile` fuses its operations, unless choices are recorded or repeated, or a capacity factor is set: the
    capacity follows from the number of tokens, so it would be compiled for each number.

    On a CPU, if every expert is visible, outputs, losses and gradients are bit-equal to `TopKRouter`'s, except in four
    settings, which docs/megatron.md lists.

    A token with one visible expert has weight exactly 1 (softmax scores) and sends no gradient to the router's weight.

    Load-balancing losses count the tokens `aux_loss_tokens`: `all`, or only `routable` ones (V ≥ 2). `statistics` holds
    sums over the tokens that were routed in training, and in evaluation as well if `counts_in_evaluation` is set.
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
        check_router_settings(config)
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.aux_loss_tokens: AuxLossTokens = aux_loss_tokens
        self.statistics = RoutingStatistics()
        self.counts_in_evaluation = False
        # In a tuple, the module is not a submodule, whose buffers the checkpoint would hold once more.
        self._mask = (visible_experts,)

    @property
    def visible_experts(self) -> VisibleExperts:
        """The model's routing mask."""
        return self._mask[0]

    @property
    def number_in_model(self) -> int:
        """The layer's number among the feed-forward layers of the model, counting from 1.

        `layer_number` starts again from 1 in multi-token prediction.

        Raises:
            ValueError: The layer has no number.
        """
        if self.layer_number is None:
            raise ValueError(
                "a MaskMoE layer has no number, and so no table of the routing mask: call "
                "set_layer_number(…) with its number among the feed-forward layers, counting from 1"
            )
        return self.layer_number + (len(self.visible_experts.layers.decoder) if self.is_mtp_layer else 0)

    @property
    def table(self) -> int:
        """The table of the routing mask that this layer uses."""
        return self.visible_experts.table_of_layer(self.number_in_model)

    @property
    def is_recording(self) -> bool:
        """Whether this forward pass counts: not in evaluation, and with recomputation only the second pass."""
        return self.training and torch.is_grad_enabled()

    @property
    def fixed_weight(self) -> float | None:
        """The weight of every token if each id sees one expert and nothing needs the logits; else None.

        A subclass that overrides `forward` or `routing` is always called, since it may weigh tokens in another way.
        """
        is_overridden = (type(self).forward, type(self).routing) != (MaskMoERouter.forward, MaskMoERouter.routing)
        has_losses = self._balancing_losses or self.config.moe_z_loss_coeff
        is_needed = has_losses or self.router_replay is not None or self.score_function != "softmax"
        if is_overridden or is_needed or self.visible_experts.max_visible[self.table] > 1:
            return None
        scaling_factor = self.config.moe_router_topk_scaling_factor
        return 1.0 if scaling_factor is None else scaling_factor

    def count(self, statistics: Tensor) -> None:
        """Count tokens that are routed by their ids alone, if this forward pass counts; see `sum_tokens`."""
        if self.is_recording or self.counts_in_evaluation:
            self.statistics.add_tokens(statistics)

    def forward(  # pyrefly: ignore[bad-override]  # the stock method takes a padding mask instead of token ids
        self, input: Tensor, token_ids: TokenIds
    ) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: Hidden states [sequence, batch, hidden].
            token_ids: The ids [sequence, batch] of the same tokens.

        Returns:
            probs: [tokens, experts], the weights of the selected experts, 0 elsewhere.
            routing_map: Bool [tokens, experts], the selected experts, unless a capacity factor drops some.

        Raises:
            ValueError: Ids or padding have another shape than the hidden states, or the layer has no number.
        """
        self._maintain_float32_expert_bias()
        logits = self.gating(self.apply_input_jitter(input))
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        if self.config.moe_router_force_biased is not None:
            logits = apply_biased_logits(logits, self.config.moe_router_force_biased, self.layer_number)
        return self.routing(logits, token_ids)

    def routing(  # pyrefly: ignore[bad-override]  # the stock method takes a padding mask instead of token ids
        self, logits: Tensor, token_ids: TokenIds
    ) -> tuple[Tensor, Tensor]:
        """Choose among the visible experts by logits [sequence, batch, experts]; see `forward`."""
        is_counted = self.is_recording or self.counts_in_evaluation
        counts_load = self.enable_expert_bias and torch.is_grad_enabled()
        replay, selected = self.router_replay, None
        if replay is not None and replay.router_replay_action in REPLAYS:
            selected = self._select_recorded(next_choice(replay), token_ids)

        rule = self._rule()
        is_compiled = rule.capacity_factor is None and replay is None
        route = _route_tokens if is_compiled else route_tokens
        routed = route(
            logits,
            _ids_of(logits, token_ids),
            self._mask_table,
            rule,
            self._loss_rule(),
            has_statistics=is_counted or counts_load,
            expert_bias=self.expert_bias,
            selected=selected,
        )

        if replay is not None and selected is None:
            assert routed.selected is not None
            record_choice(replay, routed.selected, self._mask_table.look_up(token_ids.ids.flatten()).experts)
        if routed.statistics is not None:
            if counts_load:
                assert self.local_tokens_per_expert is not None
                self.local_tokens_per_expert.add_(RoutingSums.unpack(routed.statistics).tokens_per_expert)
            if is_counted:
                self.statistics.add_tokens(routed.statistics)
        probs = routed.probs
        if routed.loss_sums is not None:
            probs = attach_losses(self, probs, routed.loss_sums)
        return probs, routed.routing_map

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, aux_loss_name: str, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attach a loss and log it as the overridden method does, also if a depth of prediction has several layers.

        The overridden method fails there: it makes a record for one feed-forward layer in each depth of multi-token
        prediction. So make the record before.
        """
        tracker = get_moe_metrics_tracker()
        if aux_loss_name not in tracker.metrics:
            num_records = self.config.num_layers + len(self.visible_experts.layers.prediction)
            tracker.record(aux_loss_name, torch.zeros_like(aux_loss), 1, num_records)
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, *args, **kwargs
        )

    def gating(self, input: Tensor) -> Tensor:
        """Compute logits as `TopKRouter.gating` does, with the bias in their dtype.

        The stock method leaves the bias, which Transformer Engine's kernel reads in the dtype of the logits.
        """
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype or "", input.dtype)
        return router_gating_linear(input, self.weight, None if self.bias is None else self.bias.to(dtype), dtype)

    @property
    def _mask_table(self) -> MaskTable:
        """The table of the routing mask that this layer uses."""
        return self.visible_experts.mask_table(self.table)

    def _rule(self) -> RoutingRule:
        """Return the settings that decide about experts and weights."""
        config = self.config
        return RoutingRule(
            topk=self.topk,
            score_function=self.score_function,
            pre_softmax=config.moe_router_pre_softmax,
            scaling_factor=config.moe_router_topk_scaling_factor,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            capacity_factor=config.moe_expert_capacity_factor,
            drop_policy=config.moe_token_drop_policy,
            pads_to_capacity=config.moe_pad_expert_input_to_capacity,
        )

    @property
    def _balancing_losses(self) -> tuple[str, ...]:
        """The load-balancing losses that have a coefficient."""
        return tuple(name for name in BALANCING_LOSSES if self.get_aux_loss_coeff(name) != 0)

    def _loss_rule(self) -> LossRule | None:
        """Return the losses of this forward pass; None if it computes no losses."""
        balancing = self._balancing_losses
        has_z_loss = bool(self.config.moe_z_loss_coeff)
        if not self.is_recording or not (balancing or has_z_loss):
            return None
        return LossRule(balancing, self.aux_loss_tokens, has_z_loss)

    def _select_recorded(self, choice: Tensor | None, token_ids: TokenIds) -> Tensor:
        """Return a recorded choice [tokens, k] in the form of `select_experts`."""
        visible = self._mask_table.look_up(token_ids.ids.flatten()).experts
        has_groups = bool(self.config.moe_router_group_topk)
        return select_replayed(choice, visible, self.topk, has_groups, token_ids, self.number_in_model)

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the expert bias in float32, as the overridden method does, and the token counts, too.

        bfloat16 cannot represent all whole numbers above 256.
        """
        super()._maintain_float32_expert_bias()
        for counts in (self.local_tokens_per_expert, self.global_tokens_per_expert, self.ga_steps):
            if counts is not None:
                counts.data = counts.data.float()


def _ids_of(tokens: Tensor, token_ids: TokenIds) -> TokenIds:
    """Return the ids of tokens [sequence, batch, …] without their plan, which would be a part of what is compiled.

    Raises:
        ValueError: Ids or padding have another shape. They are flattened, so [batch, sequence] would go unnoticed.
    """
    for per_token in (token_ids.ids, token_ids.is_padding):
        if per_token is not None and per_token.shape != tokens.shape[:2]:
            raise ValueError(
                f"a MaskMoE router got ids or padding of shape {list(per_token.shape)} for tokens "
                f"{list(tokens.shape[:2])}: a router takes [sequence, batch], layers and models take [batch, sequence]"
            )
    return TokenIds(token_ids.ids, token_ids.is_padding)
