"""Linear layers of several experts in one product, with gradients."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskmoe.transformer.kernels.grouped_product import multiply_rows, multiply_transposed


def grouped_linear(rows: Tensor, ends: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply the rows of each expert by the expert's transposed weight.

    The backward pass adds the gradients of weights to `main_grad` where Megatron's data parallelism has made one.

    Args:
        rows: [rows, in], ordered by expert.
        ends: int32 [experts], the end of each expert's rows.
        weights: the weights [out, in] of the experts.

    Returns:
        [rows, out].
    """
    return _GroupedLinear.apply(rows, ends, *weights)


class _GroupedLinear(torch.autograd.Function):
    """The product of `grouped_linear` and its gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends)
        # Hooks on saved tensors may return another tensor, which would lack `main_grad`.
        ctx.weights = weights
        return multiply_rows(rows, ends, weights, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        rows, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        needs_rows, _, *needs_weights = ctx.needs_input_grad
        rows_gradient = multiply_rows(gradient, ends, ctx.weights, transpose=False) if needs_rows else None
        trainable = [weight if needed else None for weight, needed in zip(ctx.weights, needs_weights, strict=True)]
        return rows_gradient, None, *_weight_gradients(gradient, rows, ends, trainable)


def _weight_gradients(
    gradient: Tensor, rows: Tensor, ends: Tensor, weights: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of the weights, None for None; zeros for weights whose `main_grad` has got them.

    Args:
        gradient: [rows, out], the gradient of the output.
        rows: [rows, in], the input.
        ends: int32 [experts], the end of each expert's rows.
        weights: the weights of the experts, None for those that need no gradient.
    """
    trainable = [weight for weight in weights if weight is not None]
    if not trainable:
        return [None] * len(weights)
    if not all(hasattr(weight, "grad_added_to_main_grad") for weight in trainable):
        stacked = torch.empty(len(weights), *trainable[0].shape, dtype=trainable[0].dtype, device=rows.device)
        results = [None if weight is None else part for weight, part in zip(weights, stacked.unbind(), strict=True)]
        multiply_transposed(gradient, rows, ends, results, accumulate=False)
        return results
    results = [None if weight is None else cast(Any, weight).main_grad for weight in weights]
    multiply_transposed(gradient, rows, ends, results, accumulate=True)
    for weight in trainable:
        cast(Any, weight).grad_added_to_main_grad = True
    # Megatron's hooks need gradients of the right shape, and ignore the values. All experts share the memory.
    zeros = torch.zeros_like(trainable[0])
    return [None if weight is None else zeros.detach() for weight in weights]
