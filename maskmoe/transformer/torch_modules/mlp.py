"""SwiGLU that keeps only its input for the backward pass, and the MLPs of Megatron-Core that use it."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


class TorchMLP(MLP):
    """`MLP` with the same parameters, checkpoints and bits, whose SwiGLU keeps only its input.

    `MLP` computes settings that `is_plain_swiglu` excludes, and weighted rows.
    """

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the MLP.

        Input and output are [sequence, batch, hidden]. The bias that is still to be added is returned, too, or None.
        """
        if per_token_scale is not None or not is_plain_swiglu(self.config):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        first: Any = self.linear_fc1
        second: Any = self.linear_fc2
        projected, _ = first(hidden_states)
        return second(swiglu(projected))


class TorchSharedExpertMLP(SharedExpertMLP, TorchMLP):  # pyrefly: ignore[inconsistent-inheritance]
    """`SharedExpertMLP` whose MLP is a `TorchMLP`.

    With `moe_shared_expert_overlap`, the steps of `SharedExpertMLP` compute the activation function.
    """


def is_plain_swiglu(config: TransformerConfig) -> bool:
    """Return whether `swiglu` is what the MLPs of a model compute by Megatron-Core's unfused operations."""
    return (
        config.gated_linear_unit
        and config.activation_func is silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
        and not config.add_bias_linear
        and not config.bias_activation_fusion
        and not config.use_te_activation_func
    )


def swiglu(projected: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * value * weight of each row: [..., channels] in the dtype of `projected`.

    The result and all gradients are bit-equal to those of the unfused operations, which keep two to four further
    tensors of the size of the result. The backward pass computes silu(gate) again.

    Args:
        projected: [..., 2 * channels], gates before values.
        weights: [..., 1], the weight of each row; None: no weights.
    """
    return _SwiGLU.apply(projected, weights)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(projected, weights)
        gate, value = projected.chunk(2, dim=-1)
        activated = silu(gate).mul_(value)
        return activated if weights is None else (activated * weights).to(activated.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:  # pyrefly: ignore[bad-override]
        projected, weights = ctx.saved_tensors
        (grad_output,) = gradients
        gate, value = projected.chunk(2, dim=-1)
        activated_gate, grad_weights = silu(gate), None
        if weights is not None:
            # The unfused product with the weights has the wider dtype of both factors, and so has its gradient.
            wide = grad_output.to(torch.promote_types(grad_output.dtype, weights.dtype))
            grad_weights = (wide * (activated_gate * value)).sum(dim=-1, keepdim=True).to(weights.dtype)
            grad_output = (wide * weights).to(grad_output.dtype)
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_value = grad_projected.chunk(2, dim=-1)
        torch.mul(grad_output, activated_gate, out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad_output * value, gate, grad_input=grad_gate)
        return grad_projected, grad_weights
