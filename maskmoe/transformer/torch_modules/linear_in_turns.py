"""The linear layers of several experts on a CPU, as one node of autograd's graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_in_turns(rows: Tensor, sizes: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Multiply the rows of each expert by the expert's weight, one expert after the other.

    Results and gradients are bit-equal to those of one `linear` for each expert. In a small model, the products take
    less time than slices, concatenations and nodes of autograd's graph, so all experts share one node, and each product
    writes into its part of one tensor.

    Args:
        rows: [rows, inputs], ordered by expert.
        sizes: the number of rows of each expert.
        weights: [outputs, inputs] of each expert.

    Returns:
        [rows, outputs].
    """
    return _LinearInTurns.apply(rows, sizes, *weights)


class _LinearInTurns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], *weights: Tensor) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(rows, *weights)
        outputs = rows.new_empty(len(rows), len(weights[0]))
        for of_expert, weight, out in zip(rows.split(sizes), weights, outputs.split(sizes), strict=True):
            torch.mm(of_expert, weight.t(), out=out)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        rows, *weights = ctx.saved_tensors
        needs_rows, _, *needs_weights = ctx.needs_input_grad
        of_experts = gradients[0].split(ctx.sizes)
        grad_rows = None
        if needs_rows:
            grad_rows = rows.new_empty(rows.shape)
            for gradient, weight, out in zip(of_experts, weights, grad_rows.split(ctx.sizes), strict=True):
                torch.mm(gradient, weight, out=out)
        grad_weights = (
            gradient.t().mm(own_rows) if is_needed else None
            for gradient, own_rows, is_needed in zip(of_experts, rows.split(ctx.sizes), needs_weights, strict=True)
        )
        return grad_rows, None, *grad_weights
