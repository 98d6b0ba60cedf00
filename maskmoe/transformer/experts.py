"""Experts without Transformer Engine, and with it without a wait of the host."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from maskmoe.errors import UserError


class LocalExperts(SequentialMLP):
    """`SequentialMLP` whose initial weights do not depend on expert parallelism, and whose experts can have biases."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        # On a CPU, all ranks draw the same random numbers. Every rank draws the weights of all experts and keeps its
        # own, else the experts of different ranks would start with equal weights.
        draws_on_cpu = config.use_cpu_initialization and config.perform_initialization
        num_ranks = get_pg_size(pg_collection.ep) if draws_on_cpu else 1
        super().__init__(num_local_experts * num_ranks, config, submodules, pg_collection, name)
        if num_ranks > 1:
            first = num_local_experts * get_pg_rank(pg_collection.ep)
            self.num_local_experts = num_local_experts
            self.local_experts = self.local_experts[first : first + num_local_experts]
        if config.add_bias_linear:
            # `MLP` adds the bias in place, which autograd forbids without expert parallelism: the output is a view.
            for second_layer in (module for name, module in self.named_modules() if name.endswith(".linear_fc2")):
                second_layer.register_forward_hook(_copy_output)


def _copy_output(module: torch.nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return output[0].clone(), output[1]


class CountsOnDeviceMLP(TEGroupedMLP):
    """`TEGroupedMLP` that leaves the numbers of rows on the GPU, so that the host does not wait for them.

    Transformer Engine's grouped-tensor path reads the numbers on the GPU, from Hopper on. `TEGroupedMLP` brings them to
    the host in every layer, which Transformer Engine does itself on older GPUs.

    Raises:
        UserError: Transformer Engine has no such path, or Megatron-Core needs the numbers on the host.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in (self.linear_fc1, self.linear_fc2):
            if not hasattr(layer, "use_grouped_tensor"):
                raise UserError("--moe-counts-on-device needs Transformer Engine 2.19 or newer")
            layer.use_grouped_tensor = True  # pyrefly: ignore[missing-attribute]
        if self.config.fp8 or self.config.fp4 or self.config.add_bias_linear:
            raise UserError(
                "--moe-counts-on-device needs --disable-bias-linear and 16-bit experts: Megatron-Core adds biases and "
                "pads rows for FP8 and FP4 by counts on the host"
            )

    def forward(  # pyrefly: ignore[bad-override]  # the arguments that follow are handed on
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the output of every expert for its rows; arguments as for `TEGroupedMLP.forward`."""
        counts = tokens_per_expert.to(permuted_local_hidden_states.device, non_blocking=True)
        return super().forward(permuted_local_hidden_states, counts.as_subclass(_CountsOnDevice), *args)


class _CountsOnDevice(Tensor):
    """Numbers of rows that Megatron-Core does not turn into a list."""

    def tolist(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """Return the numbers as a tensor, which Transformer Engine takes in place of a list."""
        return self.as_subclass(Tensor)
