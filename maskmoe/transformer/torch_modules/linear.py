"""A linear layer in plain torch that every tensor-parallel rank holds whole."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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
