"""The routing of tokens as pure functions of tensors, which `torch.compile` fuses on GPUs.

`route_tokens` routes, by the rule in `selection`, and sums over the tokens what the losses and the statistics need.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from maskmoe.transformer.routing_statistics import sum_tokens
from maskmoe.transformer.selection import MaskedLogits, RoutingRule, choose_experts, routing_map_of, select_experts
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import MaskTable

AuxLossTokens = Literal["all", "routable"]


@dataclass(frozen=True)
class LossRule:
    """The losses of a router, as far as their sums depend on them.

    Attributes:
        balancing: The names of the load-balancing losses, in the order in which the losses are attached.
        tokens: The tokens that load-balancing losses count: `all`, or only `routable` ones (V ≥ 2).
        has_z_loss: Whether there is a z-loss.
    """

    balancing: tuple[str, ...]
    tokens: AuxLossTokens
    has_z_loss: bool


class BalancingSums(NamedTuple):
    """The input of a load-balancing loss.

    Attributes:
        scores: Float [sequences, experts], the sums of normalized scores.
        assignments: [sequences, experts], the tokens that have an expert among their `min(k, V)` best visible experts.
        num_tokens: The tokens of a sequence that count; [sequences] if sequences may differ.
    """

    scores: Tensor
    assignments: Tensor
    num_tokens: int | Tensor


class LossSums(NamedTuple):
    """The input of all losses.

    Attributes:
        num_real: The number of tokens without padding.
        squared_logsumexp: Scalar, the sum of the terms of the z-loss; None if there is no z-loss.
        balancing: The sums of each load-balancing loss.
    """

    num_real: int | Tensor
    squared_logsumexp: Tensor | None
    balancing: dict[str, BalancingSums]


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

    Logits are [sequence, batch, experts], ids [sequence, batch], and the expert bias float32 [experts]. `selected`,
    int64 [tokens, k], is a choice to repeat. Without `losses`, nothing is summed for losses.
    """
    masked = MaskedLogits.mask(logits, table.look_up(token_ids.ids.flatten()), token_ids, rule.score_function)
    # Autograd adds gradients in reverse order. As in `TopKRouter`, the gradients of the losses come last.
    loss_sums = None if losses is None else _sum_masked(masked, rule.topk, losses)
    probs, routing_map, selected = choose_experts(masked, rule, expert_bias, selected)
    # Padding to capacity sends tokens to experts that the tokens have not chosen, with weight 0.
    chosen = routing_map & (probs > 0) if rule.pads_to_capacity else routing_map
    statistics = sum_tokens(masked, chosen) if has_statistics else None
    return Routed(probs, routing_map, selected, loss_sums, statistics)


def _sum_masked(logits: MaskedLogits, topk: int, rule: LossRule) -> LossSums:
    """Sum over the tokens what the losses need.

    Experts are assigned by normalized score, without expert bias and groups, as by Megatron-Core for its losses.
    """
    is_real, routable = logits.is_real, logits.visible.routable
    num_real = len(logits.values) if is_real is None else is_real.sum()
    # Autograd adds gradients in reverse order. `TopKRouter` adds the gradient of the z-loss last.
    squared_logsumexp = _sum_squared_logsumexp(logits) if rule.has_z_loss else None
    if not rule.balancing:
        return LossSums(num_real, squared_logsumexp, {})

    # Find the tokens that count, bool [tokens], or None if all tokens count.
    counted = is_real
    if rule.tokens == "routable" and routable is not None:
        counted = routable if is_real is None else routable & is_real
    # Set the scores and assignments of the other tokens to 0, [tokens, experts] each.
    scores, visible = logits.normalized_scores, logits.visible.experts
    assigned = routing_map_of(select_experts(scores, visible, topk), visible)
    if counted is not None:
        scores = scores * counted.unsqueeze(-1)
        assigned = assigned & counted.unsqueeze(-1)
    # Only one of the losses balances each sequence of the micro-batch; the others balance the micro-batch as a whole.
    sequences = {name: logits.num_sequences if name == "seq_aux_loss" else 1 for name in rule.balancing}
    balancing = {name: _sum_for_balancing(scores, assigned, counted, number) for name, number in sequences.items()}
    return LossSums(num_real, squared_logsumexp, balancing)


def _sum_squared_logsumexp(logits: MaskedLogits) -> Tensor:
    """Sum the squared logarithms of the sums of exponentials of the visible logits, over routable tokens."""
    squared = torch.square(torch.logsumexp(logits.values, dim=-1))  # [tokens]
    if logits.visible.routable is not None:
        squared = squared.masked_fill(~logits.visible.routable, 0.0)
    if logits.is_real is not None:
        squared = squared * logits.is_real
    return squared.sum(dtype=torch.promote_types(squared.dtype, torch.float32))  # a sum in fp16 would overflow


def _sum_for_balancing(scores: Tensor, assigned: Tensor, counted: Tensor | None, num_sequences: int) -> BalancingSums:
    """Sum over the tokens of each sequence; arguments are [tokens, experts] twice, and [tokens]."""
    num_tokens, num_experts = assigned.shape
    shape = (num_sequences, num_experts)
    # Tokens are ordered by position, then by sequence.
    return BalancingSums(
        scores.reshape(-1, num_sequences * num_experts).sum(dim=0).view(shape),
        assigned.view(-1, num_sequences * num_experts).sum(dim=0).view(shape),
        num_tokens // num_sequences if counted is None else counted.view(-1, num_sequences).sum(dim=0),
    )
