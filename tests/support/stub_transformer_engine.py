"""A stub of Transformer Engine in plain torch: the modules from which Megatron-Core builds dense layers and experts.

`install()` makes the stub importable as `transformer_engine` in this process. It must run before Megatron is imported.
The stub knows no tensor parallelism, no communication and no FP8. Tests marked `te` compare names and shapes of the
real modules.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

VERSION = "2.20.2"


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
    """One weight [out, in] for each group of rows, `weight0` and so on."""

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
        **_: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1
        assert not bias
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias = bias
        for index in range(num_gemms):
            weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            init_method(weight)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Tensor:
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return torch.cat([linear(rows, weight) for rows, weight in zip(x.split(m_splits), weights, strict=True)])


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
    modules = (RMSNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention)
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {"DelayedScaling": type("DelayedScaling", (), {})},
        ".pytorch": {module.__name__: module for module in modules} | {"LayerNorm": None},
        ".pytorch.module": {},
        ".pytorch.ops": {},
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}),
            "activation_recompute_forward": None,
            "checkpoint": None,
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
