"""A linear layer that every tensor-parallel rank holds whole, for models without Transformer Engine."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear


class ReplicatedLinear(torch.nn.Module):
    """`TELinear` with `parallel_mode="duplicated"` in plain torch: no rank divides the weight or communicates.

    The tensor-parallel ranks draw the same initial weight. Under sequence parallelism, the gradient of each rank covers
    only its part of the sequence. Marking the parameters `sequence_parallel` makes Megatron-Core's
    `finalize_model_grads` add the gradients of all ranks.

    Args:
        input_size: features of the input.
        output_size: features of the output.
        config: the model's configuration.
        init_method: draws the initial weight.
        bias: whether to add a bias, which is 0 at first.
        unused: further arguments of `TELinear`; ignored.
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
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        options: dict[str, Any] = {"device": device, "dtype": config.params_dtype}
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(output_size, **options)) if bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyrefly: ignore[missing-attribute]
        # As in Megatron's local linear layers: a state dict may lack the entry of `get_extra_state`.
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *args, **kwargs: state_dict.setdefault(f"{prefix}_extra_state")
        )
        if not config.perform_initialization:
            return
        if config.use_cpu_initialization:
            whole = (output_size, input_size, output_size)
            _initialize_affine_weight_cpu(
                self.weight, *whole, 0, init_method, rank=0, world_size=1, skip_set_tensor_parallel_attributes=True
            )
        else:
            tracker: Any = get_cuda_rng_tracker()
            with tracker.fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Multiply [..., input features] by the weight; return [..., output features], and None in place of a bias."""
        return linear(features, self.weight, self.bias), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the parameters for a checkpoint, whole and equal on all tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def get_extra_state(self) -> None:
        """Save the entry in which Transformer Engine keeps the state of fp8, so that checkpoints can be exchanged."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore the state of fp8."""

    def backward_dw(self) -> None:
        """Do nothing: the gradient of the weight is never deferred."""
