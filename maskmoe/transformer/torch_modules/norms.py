"""Norms in plain torch for tensor- and sequence-parallel models."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm, rms_norm


class TorchRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` that keeps only its input for the backward pass, also on a CPU.

    Torch has a fused kernel for GPUs. On a CPU, torch computes the norm by a sequence of operations, which keep the
    normalized input, too, and both in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x`; computed in fp32."""
        return _RMSNorm.apply(x, self.weight, self.eps) if x.is_cpu else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / root mean square
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        x, weight, inverse = ctx.saved_tensors
        features, fp32_weight = x.shape[-1], weight.float()
        fp32_input, gradient = x.float(), gradients[0].float()
        products = (gradient * fp32_input).reshape(-1, features)
        grad_weight = inverse.flatten() @ products
        # The part that comes from the root mean square is in proportion to the input.
        along_input = (products @ fp32_weight).view_as(inverse).mul_(inverse.pow(3)).div_(-features)
        grad_input = (gradient * fp32_weight).mul_(inverse).addcmul_(fp32_input, along_input)
        return grad_input.to(x.dtype), grad_weight.to(weight.dtype), None


class TorchLayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` that adds up the gradients of its parameters in fp32, also on a CPU.

    On a CPU, torch adds them up in the dtype of the input: in bf16, small parts of a large sum are lost.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimension of `input`; computed in fp32."""
        if not input.is_cpu or input.dtype == torch.float32:
            return super().forward(input)
        return _LayerNorm.apply(input, self.weight, self.bias, self.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        features = x.shape[-1:]
        output, mean, inverse = torch.native_layer_norm(x.float(), features, weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return output.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        x, weight, bias, *moments = ctx.saved_tensors
        inputs = (gradients[0].float(), x.float(), x.shape[-1:], *moments, weight.float(), bias.float())
        of_input, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(*inputs, [True] * 3)
        return of_input.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(bias.dtype), None


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the weight minus one as its parameter, as `layernorm_zero_centered_gamma` asks."""

    def reset_parameters(self) -> None:
        """Set the parameter to 0, which is a weight of 1."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x`."""
        normalized = rms_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normalized, normalized, self.weight)


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with the weight minus one as its parameter, as `layernorm_zero_centered_gamma` asks."""

    def reset_parameters(self) -> None:
        """Set the parameters to 0, which is a weight of 1."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimension of `input`."""
        normalized = layer_norm(input, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normalized, normalized, self.weight) + self.bias


_NORMS = {
    # By `layernorm_zero_centered_gamma` and `normalization`.
    (False, "LayerNorm"): TorchLayerNorm,
    (False, "RMSNorm"): TorchRMSNorm,
    (True, "LayerNorm"): ZeroCentredLayerNorm,
    (True, "RMSNorm"): ZeroCentredRMSNorm,
}


class TorchNorm:
    """Builds the norm that `WrappedTorchNorm` builds, also for sequence parallelism, which `WrappedTorchNorm` refuses.

    Under sequence parallelism, the gradient of the norm's weight covers only this rank's part of the sequence. Marking
    the parameters `sequence_parallel` makes Megatron-Core's `finalize_model_grads` add the gradients of all ranks.

    With `fp32_residual_connection`, the norm casts its input to the dtype of its parameters, which the next linear
    layer needs. Transformer Engine's norm does the same.

    This is a class because Megatron-Core's `build_module` does not call functions.

    Raises:
        ValueError: Torch has no such norm.
    """

    def __new__(  # pyrefly: ignore[bad-return]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.LayerNorm | torch.nn.RMSNorm:
        """Build a norm of torch."""
        norm_class = _NORMS.get((config.layernorm_zero_centered_gamma, config.normalization))
        if norm_class is None:
            raise ValueError(f"torch has no normalization {config.normalization}; use LayerNorm or RMSNorm")
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyrefly: ignore[missing-attribute]
        if config.fp32_residual_connection:
            norm.register_forward_pre_hook(_cast_to_parameters)
        return norm


def _cast_to_parameters(norm: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
    """Cast the input of a norm to the dtype of its parameters; a forward pre-hook."""
    return args[0].to(next(norm.parameters()).dtype)


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the features of all heads of a token (OLMoE, arXiv 2409.02060, section 4.2.5).

    The module replaces the norm of each head in Megatron-Core's `SelfAttention`. Heads are divided over the
    tensor-parallel ranks, so the ranks add up their squares. Every rank holds the whole weight, as for the replaced
    norm: `finalize_model_grads` finds the weight by its name and adds the gradients of all ranks, and a checkpoint fits
    any layout.

    `hidden_size` is the size of one head. If the model has fewer heads than ranks, neighbouring ranks hold the same
    head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        group = tp_group or parallel_state.get_tensor_model_parallel_group()
        assert group is not None
        self.tp_group = group
        self.eps = eps
        self.num_features = num_heads * hidden_size
        tp_size = self.tp_group.size()
        self._num_copies = max(1, tp_size // num_heads)
        first_head = self.tp_group.rank() * num_heads // tp_size
        num_local_heads = max(1, num_heads // tp_size)
        self._local = slice(first_head * hidden_size, (first_head + num_local_heads) * hidden_size)
        self.weight = torch.nn.Parameter(torch.ones(self.num_features, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalize all heads of each token, [sequence, batch, heads of this rank, channels]; computed in fp32."""
        features = heads.flatten(2).float()  # [sequence, batch, features of this rank]
        squares = features.square().sum(dim=-1, keepdim=True)
        # The output of each rank depends on the squares of all ranks: add squares forward, and gradients backward.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        mean_square = squares / (self.num_features * self._num_copies)
        normalized = features * torch.rsqrt(mean_square + self.eps) * self.weight[self._local].float()
        return normalized.to(heads.dtype).view_as(heads)
