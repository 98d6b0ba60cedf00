"""Sums over the tokens of a rank, from which the router's losses are computed.

`MaskedLogitsSums` computes the sums in plain torch, `kernels.routing.KernelSums` by a kernel.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from maskmoe.transformer.selection import MaskedLogits, routing_map_of, select_experts

AuxLossTokens = Literal["all", "routable"]


@dataclass(frozen=True)
class BalancingSums:
    """Sums over this rank's tokens, the input of a load-balancing loss.

    Attributes:
        scores: float [sequences, experts], the sums of normalized scores.
        assignments: [sequences, experts], the tokens that have an expert among their `min(k, V)` best visible experts.
        num_tokens: the tokens of a sequence that count; [sequences] if sequences may differ.
    """

    scores: Tensor
    assignments: Tensor
    num_tokens: int | Tensor


class LossSums(Protocol):
    """Sums over this rank's tokens, from which the losses are computed."""

    @property
    def num_real(self) -> int | Tensor:
        """The number of tokens without padding."""
        ...

    def squared_logsumexp(self) -> Tensor:
        """Sum the squared logarithms of the sums of exponentials of the visible logits, over routable tokens."""
        ...

    def for_balancing(self, num_sequences: int) -> BalancingSums:
        """Sum scores and assignments: over all tokens for 1 sequence, else over each sequence of the micro-batch."""
        ...


@dataclass(frozen=True)
class MaskedLogitsSums:
    """Computes `LossSums` from masked logits.

    Attributes:
        logits: the masked logits.
        topk: k.
        aux_loss_tokens: tokens that load-balancing losses count.
    """

    logits: MaskedLogits
    topk: int
    aux_loss_tokens: AuxLossTokens

    @cached_property
    def num_real(self) -> int | Tensor:
        """The number of tokens without padding."""
        return len(self.logits.values) if self.logits.is_real is None else self.logits.is_real.sum()

    def squared_logsumexp(self) -> Tensor:
        """Sum the terms of the z-loss."""
        squared = torch.square(torch.logsumexp(self.logits.values, dim=-1))  # [tokens]
        if self.logits.visible.routable is not None:
            squared = squared.masked_fill(~self.logits.visible.routable, 0.0)
        return squared.sum() if self.logits.is_real is None else (squared * self.logits.is_real).sum()

    def for_balancing(self, num_sequences: int) -> BalancingSums:
        """Sum scores and assignments, see `LossSums`."""
        scores, assigned = self._assignments
        num_tokens, num_experts = assigned.shape
        shape = (num_sequences, num_experts)
        return BalancingSums(
            scores.reshape(-1, num_sequences * num_experts).sum(dim=0).view(shape),
            assigned.view(-1, num_sequences * num_experts).sum(dim=0).view(shape),
            num_tokens // num_sequences if self._counted is None else self._counted.view(-1, num_sequences).sum(dim=0),
        )

    @cached_property
    def _counted(self) -> Tensor | None:
        """The tokens that load-balancing losses count, bool [tokens]; None if all tokens count."""
        counted, routable = self.logits.is_real, self.logits.visible.routable
        if self.aux_loss_tokens == "all" or routable is None:
            return counted
        return routable if counted is None else routable & counted

    @cached_property
    def _assignments(self) -> tuple[Tensor, Tensor]:
        """Normalized scores and selected experts of the tokens that count, [tokens, experts] each.

        Experts are selected by normalized score, without expert bias and groups, as by Megatron-Core for its losses.
        """
        scores, visible = self.logits.normalized_scores, self.logits.visible.experts
        assigned = routing_map_of(select_experts(scores, visible, self.topk), visible)
        if self._counted is not None:
            scores = scores * self._counted.unsqueeze(-1)
            assigned = assigned & self._counted.unsqueeze(-1)
        return scores, assigned
