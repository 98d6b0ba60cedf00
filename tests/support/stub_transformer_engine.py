"""A stub of Transformer Engine in plain torch: the modules from which Megatron-Core builds dense layers and experts.

`install()` makes the stub importable as `transformer_engine` in this process. It must run before Megatron is imported.
The stub knows no tensor parallelism and no communication. With FP8 and FP4 it pads the rows of experts, but computes in
the precision of the weights. Tests marked `te` compare it with the real modules.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention

VERSION = "2.20.2"
ALIGNMENT = 16
"""Rows of an expert with FP8 and FP4 are padded to a multiple of this number."""
CALLS: list[str] = []
"""The calls of `checkpoint`, `Fp8Padding` and `Fp8Unpadding`, and of `GroupedLinear` with a tensor, in order."""


class Module(torch.nn.Module):
    """A module with the state of FP8 training, which is empty."""

    fp8 = fp8_calibration = False
    fp8_meta = {"fp8_checkpoint": False}  # noqa: RUF012  # Megatron reads it, nothing writes it

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...


class RMSNorm(Module):
    """A norm over the last dimension."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        *,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(Module):
    """`weight` [out, in] and, with `bias`, `bias` [out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        tp_size: int,
        init_method: Callable[[Tensor], Any],
        params_dtype: torch.dtype,
        device: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1
        self.in_features, self.out_features, self.tp_size = in_features, out_features, tp_size
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = Parameter(torch.zeros(out_features, dtype=params_dtype, device=device)) if bias else None
        init_method(self.weight)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return (linear(x, self.weight), self.bias) if self.return_bias else linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    """`Linear` with a norm before it, whose parameters begin with `layer_norm_`."""

    def __init__(self, in_features: int, *args: Any, eps: float, normalization: str, **kwargs: Any) -> None:
        super().__init__(in_features, *args, **kwargs)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = Parameter(torch.ones_like(self.weight[0]))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps))


class GroupedLinear(Module):
    """One weight [out, in] for each group of rows, `weight0` and so on.

    With `delay_wgrad_compute`, the backward pass leaves the gradients of the weights unset, and `backward_dw` computes
    the gradients of the oldest backward pass that still lacks them: with `fuse_wgrad_accumulation` it adds them to
    `main_grad`, otherwise it replaces `grad`. With NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM, the layer refuses
    numbers of rows that are not on the device of the rows.
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp_size: int,
        init_method: Callable[[Tensor], Any],
        params_dtype: torch.dtype,
        device: Any,
        fuse_wgrad_accumulation: bool,
        delay_wgrad_compute: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1
        assert not bias
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.fuse_wgrad_accumulation = bias, fuse_wgrad_accumulation
        self.deferred: list[list[Tensor]] | None = [] if delay_wgrad_compute else None
        self.use_grouped_tensor = os.environ.get("NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM") == "1"
        for index in range(num_gemms):
            weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            init_method(weight)
            weight.skip_backward_post_hook = delay_wgrad_compute
            self.register_parameter(f"weight{index}", weight)

    @property
    def weights(self) -> list[Parameter]:
        return [getattr(self, f"weight{index}") for index in range(self.num_gemms)]

    def forward(self, x: Tensor, m_splits: Sequence[int] | Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        if self.use_grouped_tensor:
            assert type(m_splits) is Tensor
            assert m_splits.device == x.device
            CALLS.append("rows on the device")
            m_splits = m_splits.tolist()
        return _GroupedProduct.apply(x, m_splits, self, *self.weights)

    def backward_dw(self) -> None:
        for weight, gradient in zip(self.weights, self.deferred.pop(0) if self.deferred else (), strict=False):
            if self.fuse_wgrad_accumulation:
                weight.main_grad.add_(gradient)
            else:
                weight.grad = gradient


class _GroupedProduct(torch.autograd.Function):
    """Multiplies groups of rows by the weights of a `GroupedLinear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m_splits: Sequence[int], layer: GroupedLinear, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.m_splits, ctx.layer = m_splits, layer
        return torch.cat([linear(rows, weight) for rows, weight in zip(x.split(m_splits), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gradients = gradient.split(ctx.m_splits)
        x_gradient = torch.cat([rows @ weight for rows, weight in zip(gradients, weights, strict=True)])
        of_weights = [own.t() @ rows for own, rows in zip(gradients, x.split(ctx.m_splits), strict=True)]
        if ctx.layer.deferred is not None:
            ctx.layer.deferred.append(of_weights)
            # Transformer Engine returns memory whose content is undefined.
            of_weights = [torch.full_like(weight, torch.nan) for weight in weights]
            for weight in ctx.layer.weights:
                weight.grad_added_to_main_grad = ctx.layer.fuse_wgrad_accumulation
        return x_gradient, None, None, *of_weights


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool,
    get_rng_state_tracker: Callable[[], Any],
    tp_group: ProcessGroup,
) -> Any:
    """Compute a function, and compute it again in the backward pass."""
    assert not distribute_saved_activations
    CALLS.append("checkpoint")
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


def _padded(m_splits: Sequence[int]) -> list[int]:
    return [-(-rows // ALIGNMENT) * ALIGNMENT for rows in m_splits]


class Fp8Padding(torch.nn.Module):
    """Appends rows of zeros to each group of rows; returns all rows, and their number in each group."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        CALLS.append("pad")
        padded = _padded(m_splits)
        groups = zip(x.split(m_splits), padded, strict=True)
        return torch.cat([pad(rows, (0, 0, 0, target - len(rows))) for rows, target in groups]), padded


class Fp8Unpadding(Fp8Padding):
    """Removes the rows that `Fp8Padding` appends."""

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        CALLS.append("unpad")
        return torch.cat([rows[:own] for rows, own in zip(x.split(_padded(m_splits)), m_splits, strict=True)])


class DotProductAttention(torch.nn.Module):
    """Causal attention of [sequence, batch, heads, head size]; Megatron saves no state of the module."""

    def __init__(self, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, attn_mask_type: str) -> Tensor:
        assert attn_mask_type == "causal"
        by_head = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = scaled_dot_product_attention(*by_head, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return output.permute(2, 0, 1, 3).flatten(2)


def install() -> None:
    """Make the stub importable as `transformer_engine`."""
    modules = (RMSNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention, Fp8Padding, Fp8Unpadding)
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {"DelayedScaling": type("DelayedScaling", (), {})},
        ".pytorch": {module.__name__: module for module in modules} | {"LayerNorm": None},
        ".pytorch.module": {"is_module_grouped_tensor_path_supported": lambda recipe, dtype: dtype != torch.float16},
        ".pytorch.ops": {},
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}),
            "activation_recompute_forward": None,
            "checkpoint": checkpoint,
        },
        ".pytorch.fp8": dict.fromkeys(("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"), SimpleNamespace()),
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        # Megatron imports the fused router, which MaskMoE refuses.
        ".pytorch.router": dict.fromkeys(
            ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
        ),
    }
    for suffix, attributes in contents.items():
        name = f"transformer_engine{suffix}"
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, loader=None)
        vars(module).update(attributes)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
