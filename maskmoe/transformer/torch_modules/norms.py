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
from torch.nn.functional import rms_norm


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


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the weight minus one as its parameter, as `layernorm_zero_centered_gamma` asks."""

    def reset_parameters(self) -> None:
        """Set the parameter to 0, which is a weight of 1."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x`."""
        normalized = rms_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(normalized, normalized, self.weight)


_NORMS = {
    # By `layernorm_zero_centered_gamma` and `normalization`.
    (False, "LayerNorm"): torch.nn.LayerNorm,
    (False, "RMSNorm"): TorchRMSNorm,
    (True, "RMSNorm"): ZeroCentredRMSNorm,
}


class TorchNorm:
    """Builds the norm that `WrappedTorchNorm` builds, also for sequence parallelism, which `WrappedTorchNorm` refuses.

    Under sequence parallelism, the gradient of the norm's weight covers only this rank's part of the sequence. Marking
    the parameters `sequence_parallel` makes Megatron-Core's `finalize_model_grads` add the gradients of all ranks.

    This is a class because Megatron-Core's `build_module` does not call functions.

    Raises:
        ValueError: There is no such norm.
    """

    def __new__(  # pyrefly: ignore[bad-return]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.LayerNorm | torch.nn.RMSNorm:
        """Build a norm of torch."""
        norm_class = _NORMS.get((config.layernorm_zero_centered_gamma, config.normalization))
        if norm_class is None:
            kind = "zero-centred " * config.layernorm_zero_centered_gamma + config.normalization
            raise ValueError(f"--transformer-impl local has no {kind}; use RMSNorm")
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyrefly: ignore[missing-attribute]
        return norm


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
