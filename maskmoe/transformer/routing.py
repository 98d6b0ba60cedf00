"""The routing of tokens as pure functions of tensors, which `torch.compile` fuses on GPUs.

`route_tokens` routes, by the rule in `selection`, and sums over the tokens what the losses and the statistics need.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from maskmoe.transformer.routing_statistics import columns_of_statistics, sum_tokens
from maskmoe.transformer.selection import (
    Choice,
    MaskedLogits,
    RoutingRule,
    choose_experts,
    preference_scores,
    routing_map_of,
    weigh_experts,
)
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.token_sums import Columns, sum_columns
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
        selected: Int64 [tokens, k], the experts as `select_experts` returns them; None in compiled code.
        loss_sums: The sums for the losses; None if no losses were given.
        statistics: [3 + experts], see `RoutingStatistics.add_tokens`; None if they were not asked for.
    """

    probs: Tensor
    routing_map: Tensor
    selected: Tensor | None
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
    visible = masked.visible.experts
    # Autograd adds gradients in reverse order. In `TopKRouter`, the gradients of the losses come last, and of these the
    # z-loss. So the weights are computed after the losses.
    columns: dict[str, Columns] = {}
    if losses is not None and losses.has_z_loss:
        columns["z-loss"] = _column_of_z_loss(masked)
    if selected is None:
        scores = preference_scores(masked, rule.pre_softmax, expert_bias)
        choice = choose_experts(scores, visible, rule.topk, rule.num_groups, rule.group_topk)
    else:
        choice = Choice(routing_map_of(selected, visible), selected)

    # Sum everything in one pass.
    if losses is not None:
        # Losses know neither expert bias nor groups. Softmax does not change the order of the logits.
        is_shared = selected is None and rule.score_function == "softmax" and not rule.group_topk
        columns |= _columns_of_balancing(masked, rule.topk, losses, choice.routing_map if is_shared else None)
    drops_tokens = rule.capacity_factor is not None
    if has_statistics and not drops_tokens:
        columns["statistics"] = columns_of_statistics(masked, choice.routing_map)
    sums = dict(zip(columns, sum_columns(tuple(columns.values())), strict=True)) if columns else {}

    loss_sums = None if losses is None else _loss_sums(masked, losses, sums)
    probs, routing_map = weigh_experts(masked, choice, rule, expert_bias)
    statistics = None
    if has_statistics and drops_tokens:
        # Padding to capacity sends tokens to experts that the tokens have not chosen, with weight 0.
        statistics = sum_tokens(masked, routing_map & (probs > 0) if rule.pads_to_capacity else routing_map)
    elif has_statistics:
        statistics = sums["statistics"].squeeze(0)
    return Routed(probs, routing_map, choice.indices, loss_sums, statistics)


def _column_of_z_loss(logits: MaskedLogits) -> Columns:
    """Return the squared logarithms of the sums of exponentials of the visible logits, 0 unless a token is routable."""
    squared = torch.square(torch.logsumexp(logits.values, dim=-1))  # [tokens]
    if logits.visible.routable is not None:
        squared = squared.masked_fill(~logits.visible.routable, 0.0)
    if logits.is_real is not None:
        squared = squared * logits.is_real
    dtype = torch.promote_types(squared.dtype, torch.float32)  # a sum in fp16 would overflow
    return Columns(squared.unsqueeze(1), dtype)


def _columns_of_balancing(logits: MaskedLogits, topk: int, rule: LossRule, chosen: Tensor | None) -> dict[str, Columns]:
    """Return what is summed for load-balancing losses, and the real tokens.

    Experts are assigned by normalized score, without expert bias and groups, as by Megatron-Core for its losses.
    `chosen` is bool [tokens, experts], the assignment if it is known.
    """
    is_real = logits.is_real
    columns = {} if is_real is None else {"real": Columns(is_real.unsqueeze(1), torch.int64)}
    if not rule.balancing:
        return columns
    # Set the scores and assignments of tokens that do not count to 0, [tokens, experts] each.
    scores, visible, counted = logits.normalized_scores, logits.visible.experts, _counted(logits, rule)
    assigned = choose_experts(scores.detach(), visible, topk).routing_map if chosen is None else chosen
    if counted is not None:
        scores = scores * counted.unsqueeze(-1)
        assigned = assigned & counted.unsqueeze(-1)
    for name in rule.balancing:
        # Only one of the losses balances each sequence of the micro-batch; the others balance it as a whole.
        number = logits.num_sequences if name == "seq_aux_loss" else 1
        columns[f"scores of {name}"] = Columns(scores, scores.dtype, number)
        columns[f"assigned of {name}"] = Columns(assigned, torch.int64, number)
        if counted is not None:
            columns[f"counted of {name}"] = Columns(counted.unsqueeze(1), torch.int64, number)
    return columns


def _loss_sums(logits: MaskedLogits, rule: LossRule, sums: dict[str, Tensor]) -> LossSums:
    """Return the sums of the columns for losses."""
    num_tokens, balancing = len(logits.values), {}
    for name in rule.balancing:
        scores, counted = sums[f"scores of {name}"], sums.get(f"counted of {name}")
        num_counted = num_tokens // len(scores) if counted is None else counted.squeeze(1)
        balancing[name] = BalancingSums(scores, sums[f"assigned of {name}"], num_counted)
    return LossSums(
        num_real=sums["real"].view(()) if "real" in sums else num_tokens,
        squared_logsumexp=sums["z-loss"].view(()) if rule.has_z_loss else None,
        balancing=balancing,
    )


def _counted(logits: MaskedLogits, rule: LossRule) -> Tensor | None:
    """Return the tokens that load-balancing losses count, bool [tokens]; None if all tokens count."""
    is_real, routable = logits.is_real, logits.visible.routable
    if rule.tokens == "all" or routable is None:
        return is_real
    return routable if is_real is None else routable & is_real
