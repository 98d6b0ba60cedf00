"""The routing rule: which visible experts a token is sent to, and with which weights.

`route_tokens` chooses with `choose_experts` and weighs with `weigh_experts`. Losses and statistics use
functions of this module.

Code that `torch.compile` generates takes other ways to the same choice and weights: passes over the experts instead of
a sort, and comparisons instead of a scatter, so that all of it is one kernel.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, topk_routing_with_score_function
from torch import Tensor
from torch.nn.functional import softplus

from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleSets

_MOST_PASSES = 8
"""The largest k for which compiled code finds one expert in each pass over the experts."""


@dataclass(frozen=True)
class RoutingRule:
    """The settings of a router that decide about experts and weights.

    Attributes:
        topk: k.
        score_function: softmax, sigmoid or sqrtsoftplus.
        pre_softmax: Apply softmax before the selection, not after it; only for the softmax score function.
        scaling_factor: Multiplies the weights; None: 1.
        num_groups: Number of expert groups of equal size, for group-limited routing.
        group_topk: Groups that are chosen for each token; None: no group-limited routing.
        capacity_factor: The capacity of an expert, relative to an even share of all assignments; None: no tokens are
            dropped.
        drop_policy: The tokens to drop beyond the capacity: those with the smallest `probs`, or by `position`.
        pads_to_capacity: Fill up every expert to its capacity.
    """

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    scaling_factor: float | None = None
    num_groups: int | None = None
    group_topk: int | None = None
    capacity_factor: float | None = None
    drop_policy: str = "probs"
    pads_to_capacity: bool = False


@dataclass(frozen=True)
class MaskedLogits:
    """The router logits of one micro-batch under the routing mask.

    Attributes:
        values: [tokens, experts], -inf for invisible experts.
        visible: The visible sets of the tokens.
        is_real: Bool [tokens], False for padding; None if no token is padding.
        num_sequences: Sequences in the micro-batch. Tokens are ordered by position, then by sequence.
        score_function: softmax, sigmoid or sqrtsoftplus.
    """

    values: Tensor
    visible: VisibleSets
    is_real: Tensor | None
    num_sequences: int
    score_function: str

    @classmethod
    def mask(cls, logits: Tensor, visible: VisibleSets, token_ids: TokenIds, score_function: str) -> "MaskedLogits":
        """Set the logits [sequence, batch, experts] of invisible experts to -inf."""
        values = logits.flatten(0, 1).masked_fill(~visible.experts, float("-inf"))
        return cls(values, visible, token_ids.is_real, logits.shape[1], score_function)

    @cached_property
    def normalized_scores(self) -> Tensor:
        """Return scores that add up to 1 for each token: float32 [tokens, experts], 0 for invisible experts.

        Selection, losses and statistics share the scores, so they are computed at most once.
        """
        if self.score_function == "softmax":
            return torch.softmax(self.values, dim=-1, dtype=torch.float32)
        scores = _elementwise_scores(self.values, self.score_function)
        return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # Megatron-Core adds the same 1e-20.


@dataclass(frozen=True)
class Choice:
    """The experts that tokens choose.

    Attributes:
        routing_map: Bool [tokens, experts], the chosen experts, which are visible.
        indices: Int64 [tokens, k], the experts as `select_experts` returns them; None if compiled code found the map.
    """

    routing_map: Tensor
    indices: Tensor | None


def choose_experts(
    scores: Tensor, visible: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> Choice:
    """Choose the top `min(k, V)` visible experts by score; arguments as for `select_experts`."""
    if not torch.compiler.is_compiling() or topk > _MOST_PASSES:
        indices = select_experts(scores, visible, topk, num_groups, group_topk)
        return Choice(routing_map_of(indices, visible), indices)
    candidates = _candidates(scores, visible, topk, num_groups, group_topk)
    number = torch.arange(scores.shape[1], device=scores.device)
    chosen = torch.zeros_like(visible)
    for _ in range(topk):
        is_best = number == candidates.argmax(dim=1, keepdim=True)
        chosen = chosen | is_best
        candidates = candidates.masked_fill(is_best, float("-inf"))
    return Choice(chosen & visible, None)


def weigh_experts(
    logits: MaskedLogits, choice: Choice, rule: RoutingRule, expert_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the weights of chosen experts.

    Returns:
        [tokens, experts], the weights of the selected experts, 0 elsewhere; and bool [tokens, experts], the experts
        that each token is sent to.
    """
    routing_map = choice.routing_map
    if choice.indices is None:
        probs = _weigh_by_map(logits, routing_map, rule)
    else:
        probs, _ = topk_routing_with_score_function(
            logits.values,
            rule.topk,
            use_pre_softmax=rule.pre_softmax,
            scaling_factor=rule.scaling_factor,
            score_function=rule.score_function,
            expert_bias=expert_bias,
            precomputed_indices=choice.indices,
        )
    if rule.capacity_factor is not None:
        priorities = probs
        if rule.drop_policy == "position":
            # Keep the first tokens. Megatron-Core 0.19.2 leaves the choice to the order of ties in `topk`, and on a CPU
            # keeps the last ones.
            places = torch.arange(len(probs), 0, -1, device=probs.device, dtype=torch.float32)
            priorities = routing_map * places.unsqueeze(-1)
        _, routing_map = apply_router_token_dropping(
            priorities,
            routing_map,
            router_topk=rule.topk,
            capacity_factor=rule.capacity_factor,
            drop_policy="probs",
            pad_to_capacity=rule.pads_to_capacity,
        )
        probs = probs * routing_map
    return probs, routing_map


def _weigh_by_map(logits: MaskedLogits, routing_map: Tensor, rule: RoutingRule) -> Tensor:
    """Compute the weights of `topk_routing_with_score_function` for the experts of a map, without indices."""
    if rule.score_function != "softmax":
        scores = _elementwise_scores(logits.values, rule.score_function).where(routing_map, 0.0)
        probs = scores / (scores.sum(dim=1, keepdim=True) + 1e-20) if rule.topk > 1 else scores
    elif rule.pre_softmax:
        probs = logits.normalized_scores.where(routing_map, 0.0)
    else:
        probs = torch.softmax(logits.values.masked_fill(~routing_map, float("-inf")), dim=1, dtype=torch.float32)
    if rule.scaling_factor:
        probs = probs * rule.scaling_factor
    return probs.type_as(logits.values)


def preference_scores(logits: MaskedLogits, pre_softmax: bool, expert_bias: Tensor | None) -> Tensor:
    """Return the scores [tokens, experts] that rank the experts, as Megatron-Core does.

    The expert bias, float32 [experts], is added to sigmoid and sqrtsoftplus scores.
    """
    if logits.score_function == "softmax":
        return logits.normalized_scores.detach() if pre_softmax else logits.values.detach()
    scores = _elementwise_scores(logits.values.detach(), logits.score_function)
    return scores if expert_bias is None else scores + expert_bias.float()


def select_experts(
    scores: Tensor, visible: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> Tensor:
    """Select the top k experts by score: `min(k, V)` visible experts, then invisible experts to fill up to k.

    Masked logits alone do not suffice. Score functions map -inf to 0, and an expert bias can lift a score of 0 above
    the score of a visible expert. The score of a visible expert can also round to 0.

    Args:
        scores: [tokens, experts].
        visible: Bool [tokens, experts].
        topk: k.
        num_groups: Number of expert groups of equal size, for group-limited routing.
        group_topk: Groups that are chosen for each token; None: no group-limited routing.

    Returns:
        Int64 [tokens, k], the indices of the experts. With groups, only the visible experts of the chosen groups count
        as visible.
    """
    # Megatron-Core sorts in training, and with groups always. The order decides how weights are summed, so it must be
    # the same here.
    is_sorted = torch.is_grad_enabled() or bool(group_topk)
    candidates = _candidates(scores, visible, topk, num_groups, group_topk)
    return candidates.topk(topk, dim=1, sorted=is_sorted).indices


def _candidates(scores: Tensor, visible: Tensor, topk: int, num_groups: int | None, group_topk: int | None) -> Tensor:
    """Return scores [tokens, experts] that rank invisible experts last; arguments as for `select_experts`."""
    candidates = scores.masked_fill(~visible, float("-inf"))
    if not group_topk:
        return candidates
    assert num_groups is not None
    outside = _outside_chosen_groups(candidates, topk, num_groups, group_topk)
    # Experts that fill up to k must be invisible, because callers recognize them by that. The chosen groups hold at
    # least k experts, so invisible experts of the chosen groups rank above all experts of other groups.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).masked_fill(outside, float("-inf"))


def routing_map_of(selected: Tensor, visible: Tensor) -> Tensor:
    """Return bool [tokens, experts], True for the selected experts [tokens, k] that are visible."""
    return torch.zeros_like(visible).scatter(1, selected, True) & visible


def _elementwise_scores(logits: Tensor, score_function: str) -> Tensor:
    """Return sigmoid or sqrtsoftplus scores, float32 [tokens, experts]."""
    return torch.sigmoid(logits.float()) if score_function == "sigmoid" else softplus(logits.float()).sqrt()


def _outside_chosen_groups(scores: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Return bool [tokens, experts], True for experts outside the groups that are chosen for a token.

    Groups are chosen as in group-limited routing (DeepSeek-V3, arXiv 2412.19437): the score of a group is the sum of
    its `topk / group_topk` largest scores. If a group has fewer visible experts, the token's smallest visible score
    takes the missing places. A constant that is added to all scores therefore changes no choice. A group without a
    visible expert is chosen only if there are not enough other groups. `scores` is [tokens, experts], -inf for
    invisible experts.
    """
    num_tokens, num_experts = scores.shape
    group_size = num_experts // num_groups
    best = scores.view(num_tokens, num_groups, group_size).topk(topk // group_topk, dim=-1).values
    missing = best == float("-inf")
    smallest = scores.masked_fill(scores == float("-inf"), float("inf")).amin(dim=-1)  # [tokens]
    group_scores = torch.where(missing, smallest[:, None, None], best).sum(dim=-1)  # [tokens, groups]
    group_scores = group_scores.masked_fill(missing.all(dim=-1), float("-inf"))
    chosen_groups = group_scores.topk(group_topk, dim=-1, sorted=False).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen_groups, False)
    return outside.repeat_interleave(group_size, dim=1)
