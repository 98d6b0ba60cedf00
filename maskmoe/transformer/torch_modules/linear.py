"""Linear layers in plain torch: one that every tensor-parallel rank holds whole, and those of several experts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, linear


class ReplicatedLinear(torch.nn.Linear):
    """`TELinear` with `parallel_mode="duplicated"` in plain torch: no rank divides the weight or communicates.

    The tensor-parallel ranks draw the same initial weight. Under sequence parallelism, the gradient of each rank covers
    only its part of the sequence. Marking the parameters `sequence_parallel` makes Megatron-Core's
    `finalize_model_grads` add the gradients of all ranks.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **unused: Any,
    ) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(input_size, output_size, bias, device, config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyrefly: ignore[missing-attribute]
        # As in Megatron's local linear layers: a state dict may lack the entry of `get_extra_state`.
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *args, **kwargs: state_dict.setdefault(f"{prefix}_extra_state")
        )
        if not config.perform_initialization:
            return
        if config.use_cpu_initialization:
            # As in Megatron's local linear layers, the weight is drawn in fp32.
            drawn = torch.empty(self.weight.shape, dtype=torch.float32)
            init_method(drawn)
            self.weight.data.copy_(drawn)
        else:
            tracker: Any = get_cuda_rng_tracker()
            with tracker.fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)

    def reset_parameters(self) -> None:
        """Set the bias to 0; the constructor draws the weight."""
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        """Multiply [..., input features] by the weight; return [..., output features], and None in place of a bias."""
        return super().forward(input), None

    def get_extra_state(self) -> None:
        """Save the entry in which Transformer Engine keeps the state of fp8, so that checkpoints can be exchanged."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore the state of fp8."""


def linear_in_turns(rows: Tensor, sizes: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Multiply the rows of each expert by the expert's weight, one expert after the other.

    Rows are [rows, inputs], ordered by expert; `sizes` are the numbers of rows, and weights [outputs, inputs], of each
    expert. The result is [rows, outputs].
    """
    products = (linear(of_expert, weight) for of_expert, weight in zip(rows.split(sizes), weights, strict=True))
    return torch.cat([*products])


def grouped_linear(rows: Tensor, ends: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply the rows of each expert by the expert's weight, in one product, without a wait for the device.

    `grouped_mm` takes the weights as one tensor. Autograd would keep this copy, so both passes make one.

    Rows are bf16 [rows, inputs], ordered by expert; `ends` are the numbers of the rows up to the end of each expert,
    int32 [experts], and weights bf16 [outputs, inputs], of each expert. Inputs and outputs are multiples of 8. The
    result is [rows, outputs].
    """
    return _GroupedLinear.apply(rows, ends, *weights)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends, *weights)
        return grouped_mm(rows, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        rows, ends, *weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        grad_rows = grouped_mm(gradient, torch.stack(weights), offs=ends)
        if not any(ctx.needs_input_grad[2:]):  # the experts are frozen
            return grad_rows, None, *(None for _ in weights)
        grad_weights = grouped_mm(gradient.t(), rows, offs=ends)
        # On data-center Blackwell, torch writes no zeros for experts without rows (pytorch issue 172439).
        if torch.cuda.get_device_capability(rows.device)[0] == 10:
            is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
            grad_weights.masked_fill_(is_empty.view(-1, 1, 1), 0)
        return grad_rows, None, *grad_weights.unbind()
