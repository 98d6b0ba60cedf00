"""The routing of tokens as pure functions of tensors, which `torch.compile` fuses on GPUs."""

from typing import NamedTuple

from torch import Tensor

from maskmoe.transformer.router_sums import LossRule, LossSums, sum_for_losses
from maskmoe.transformer.routing_statistics import sum_tokens
from maskmoe.transformer.selection import MaskedLogits, RoutingRule, choose_experts
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import MaskTable


class Routed(NamedTuple):
    """The result of `route_tokens`.

    Attributes:
        probs: [tokens, experts], the weights of the selected experts, 0 elsewhere.
        routing_map: Bool [tokens, experts], the experts that each token is sent to.
        selected: Int64 [tokens, k], the experts as `select_experts` returns them.
        loss_sums: The sums for the losses; None if no losses were given.
        statistics: Float64 [3 + experts], see `RoutingStatistics.add_tokens`; None if they were not asked for.
    """

    probs: Tensor
    routing_map: Tensor
    selected: Tensor
    loss_sums: LossSums | None
    statistics: Tensor | None


def route_tokens(
    logits: Tensor,
    token_ids: TokenIds,
    table: MaskTable,
    rule: RoutingRule,
    losses: LossRule | None,
    has_statistics: bool,
    expert_bias: Tensor | None,
    selected: Tensor | None = None,
) -> Routed:
    """Look up the visible experts, select among them, weigh them, and sum what losses and statistics need.

    Args:
        logits: [sequence, batch, experts].
        token_ids: The ids [sequence, batch] of the same tokens.
        table: The table of the routing mask.
        rule: The settings of the router.
        losses: The losses to compute sums for; None: no sums.
        has_statistics: Whether to compute statistics.
        expert_bias: Float32 [experts]; None: no bias.
        selected: Int64 [tokens, k], a choice to repeat; None: choose.
    """
    masked = MaskedLogits.mask(logits, table.look_up(token_ids.ids.flatten()), token_ids, rule.score_function)
    # Autograd adds gradients in reverse order. As in `TopKRouter`, the gradients of the losses come last.
    loss_sums = None if losses is None else sum_for_losses(masked, rule.topk, losses)
    probs, routing_map, selected = choose_experts(masked, rule, expert_bias, selected)
    statistics = sum_tokens(masked, routing_map) if has_statistics else None
    return Routed(probs, routing_map, selected, loss_sums, statistics)


def sum_tokens_for_losses(
    logits: Tensor, token_ids: TokenIds, table: MaskTable, rule: RoutingRule, losses: LossRule
) -> LossSums:
    """Return the sums of `route_tokens` for the losses alone; arguments as for `route_tokens`."""
    masked = MaskedLogits.mask(logits, table.look_up(token_ids.ids.flatten()), token_ids, rule.score_function)
    return sum_for_losses(masked, rule.topk, losses)
