"""Auxiliary losses of a masked router.

Both reduce to Megatron-Core's own where every token sees every expert, bit for bit.
"""

import torch
from torch import Tensor


def masked_load_balancing_loss(
    scores: Tensor, tokens_per_expert: Tensor, num_tokens: int | Tensor, num_experts: int, coeff: float
) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) over masked probabilities.

    `coeff * N * Σ_i f_i P_i` with `f_i` the share of all assignments that expert i got and `P_i` its mean score.
    Unlike `switch_load_balancing_loss_func`, the number of assignments is counted: a token with fewer than k visible
    experts has fewer than k of them.

    Args:
        scores: float32 [tokens, experts], 0 outside the visible sets, the tokens of this rank.
        tokens_per_expert: int64 [experts], assignments over all ranks.
        num_tokens: number of tokens over all ranks.
        num_experts: N.
        coeff: α.

    Returns:
        float32 scalar; the losses of the ranks add up to the loss of the whole batch.
    """
    # In float64, as Python computes the factor of the stock loss.
    denominator = tokens_per_expert.sum().double() * num_tokens
    factor = (num_experts * coeff / denominator.clamp(min=1)).to(scores.dtype)
    return torch.sum(scores.sum(dim=0) * tokens_per_expert) * factor


def masked_z_loss(logits: Tensor, routable: Tensor | None, coeff: float) -> Tensor:
    """Z-loss of ST-MoE (arXiv 2202.08906, eq. 5) over the visible logits.

    A token with one visible expert contributes 0: nothing depends on its logit, so nothing keeps it in check or
    needs to.

    Args:
        logits: [tokens, experts], -inf outside the visible sets.
        routable: bool [tokens], tokens with two or more visible experts; None if all are.
        coeff: coefficient of the loss.

    Returns:
        scalar, the mean over all tokens.
    """
    squared = torch.square(torch.logsumexp(logits, dim=-1))  # [tokens]
    if routable is not None:
        squared = squared.masked_fill(~routable, 0.0)
    return torch.mean(squared) * coeff
