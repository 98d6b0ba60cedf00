"""Experts without Transformer Engine."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor


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
