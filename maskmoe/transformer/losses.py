"""Auxiliary losses of a masked router.

All reduce to Megatron-Core's own where every token sees every expert, bit for bit.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Assignments:
    """Scores and choices of a router, as the load-balancing losses take them."""

    scores: Tensor
    """float32 [tokens, experts]: each row adds up to 1; 0 for invisible experts and for tokens that do not count."""

    routing_map: Tensor
    """bool [tokens, experts]: the `min(k, V)` best visible experts of each token that counts."""

    counted: Tensor | None
    """bool [tokens]: which tokens count; None if all do."""


@dataclass(frozen=True)
class ExpertLoad:
    """What each expert got."""

    tokens_per_expert: Tensor
    """float32 [sequences * experts]: assignments, scaled to what they would be if every token had k of them."""

    num_tokens: int | Tensor
    """Tokens in a sequence, float64 if a tensor; their mean if padding makes sequences differ."""


def assign_for_balancing(
    logits: Tensor, visible: Tensor, counted: Tensor | None, topk: int, score_function: str
) -> Assignments:
    """What the load-balancing losses measure: as in Megatron-Core, the choice by score, without bias and groups.

    Args:
        logits: [tokens, experts], -inf outside the visible sets.
        visible: bool [tokens, experts].
        counted: bool [tokens], the tokens that count; None if all do.
        topk: k.
        score_function: softmax, sigmoid or sqrtsoftplus.
    """
    scores = normalized_scores(logits, score_function)
    # The score of a visible expert may round to 0, which is that of the invisible ones.
    _, selected = scores.masked_fill(~visible, float("-inf")).topk(topk, dim=1)
    routing_map = torch.zeros_like(visible).scatter(1, selected, True) & visible
    if counted is not None:
        scores = scores * counted.unsqueeze(-1)
        routing_map = routing_map & counted.unsqueeze(-1)
    return Assignments(scores, routing_map, counted)


def normalized_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores that add up to 1 for each token: float32 [tokens, experts], 0 for invisible experts.

    Args:
        logits: [tokens, experts], -inf for invisible experts.
        score_function: softmax, sigmoid or sqrtsoftplus.
    """
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    scores = torch.sigmoid(logits.float()) if score_function == "sigmoid" else softplus(logits.float()).sqrt()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # as Megatron-Core guards against 0 / 0


def measure_load(
    assignments: Assignments, topk: int, group: torch.distributed.ProcessGroup, num_sequences: int = 1
) -> ExpertLoad:
    """Count the assignments of each expert over a process group.

    Tokens with fewer than k visible experts have fewer than k assignments. Scaling by the true number of them makes
    the shares of the experts add up to 1 in every sequence.

    Args:
        assignments: of this rank's tokens; those of one position of all sequences are neighbours.
        topk: k.
        group: the ranks that share the batch.
        num_sequences: parts into which the batch is divided; 1 takes it as a whole.
    """
    num_local_tokens, num_experts = assignments.routing_map.shape
    counts = assignments.routing_map.view(-1, num_sequences * num_experts).sum(dim=0)
    if assignments.counted is None:
        counts = reduce_from_tensor_model_parallel_region(counts, group)
        num_tokens = tokens_of_sequence = num_local_tokens // num_sequences * group.size()
    else:
        tokens_of_sequence = assignments.counted.view(-1, num_sequences).sum(dim=0)
        counts = reduce_from_tensor_model_parallel_region(torch.cat([counts, tokens_of_sequence]), group)
        counts, tokens_of_sequence = counts[:-num_sequences], counts[-num_sequences:]
        num_tokens = tokens_of_sequence.double().mean()
    counts = counts.view(num_sequences, num_experts)
    total = counts.sum(dim=1).clamp(min=1).double()  # [sequences]
    scale = (topk * tokens_of_sequence / total).float()
    return ExpertLoad((counts * scale.unsqueeze(1)).flatten(), num_tokens)


def masked_load_balancing_loss(scores: Tensor, load: ExpertLoad, topk: int, num_experts: int, coeff: float) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) over masked probabilities.

    `coeff * N * Σ_i f_i P_i` with `f_i` the share of all assignments that expert i got and `P_i` its mean score, summed
    over the sequences of `load`.

    Args:
        scores: float32 [tokens, experts], 0 outside the visible sets and for tokens that do not count; the tokens of
            this rank.
        load: of all ranks.
        topk: k.
        num_experts: N.
        coeff: α.

    Returns:
        float32 scalar; the losses of the ranks add up to the loss of the whole batch.
    """
    scores = scores.reshape(-1, load.tokens_per_expert.numel())
    denominator = topk * load.num_tokens * load.num_tokens
    if isinstance(denominator, Tensor):  # in float64, as Python computes the factor of the stock loss
        factor = (num_experts * coeff / denominator.clamp(min=1e-12)).to(scores.dtype)
    else:
        factor = num_experts * coeff / denominator
    return torch.sum(scores.sum(dim=0) * load.tokens_per_expert) * factor


def masked_z_loss(logits: Tensor, routable: Tensor | None, counted: Tensor | None, coeff: float) -> Tensor:
    """Z-loss of ST-MoE (arXiv 2202.08906, eq. 5) over the visible logits.

    A token with one visible expert contributes 0: nothing depends on its logit, so nothing keeps it in check or
    needs to.

    Args:
        logits: [tokens, experts], -inf outside the visible sets.
        routable: bool [tokens], tokens with two or more visible experts; None if all are.
        counted: bool [tokens], tokens that are no padding; None if none is.
        coeff: coefficient of the loss.

    Returns:
        scalar, the mean over all tokens that count.
    """
    squared = torch.square(torch.logsumexp(logits, dim=-1))  # [tokens]
    if routable is not None:
        squared = squared.masked_fill(~routable, 0.0)
    if counted is None:
        return torch.mean(squared) * coeff
    return (squared * counted).sum() / counted.sum().clamp(min=1.0) * coeff
