"""Experts without Transformer Engine, whose activation functions are computed together on a CPU."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from maskmoe.transformer.gathered_parameters import waits_for_parameters


class GroupedMLP(SequentialMLP):
    """`SequentialMLP` with the same parameters and checkpoints that computes all activations at once on a CPU.

    The experts take turns in each linear layer, and one activation computes all rows. The result is bit-equal to
    `SequentialMLP` with SwiGLU. With other activations, torch computes the last elements of a tensor, which fill no
    vector, by other instructions, and the rows of one expert end with other elements than all rows.

    Experts with biases are also computed so on a GPU. `SequentialMLP` adds biases in place, which autograd forbids
    without expert parallelism, because the outputs of the linear layers are views. `SequentialMLP` computes other
    experts on a GPU, and experts with hooks.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        """Build the experts; on a CPU, with weights that do not depend on expert parallelism."""
        # On a CPU, all ranks draw the same random numbers. Every rank draws the weights of all experts and keeps its
        # own, else the experts of different ranks would start with equal weights.
        draws_on_cpu = config.use_cpu_initialization and config.perform_initialization
        num_ranks = get_pg_size(pg_collection.ep) if draws_on_cpu else 1
        super().__init__(num_local_experts * num_ranks, config, submodules, pg_collection, name)
        if num_ranks > 1:
            first = num_local_experts * get_pg_rank(pg_collection.ep)
            self.num_local_experts = num_local_experts
            self.local_experts = self.local_experts[first : first + num_local_experts]

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the output of every expert for its rows.

        Args:
            permuted_local_hidden_states: [rows, hidden], ordered by expert.
            tokens_per_expert: Integers [local experts], on any device.
            permuted_probs: [rows], the weight of each row.

        Returns:
            [rows, hidden] and the bias, None.
        """
        rows, probs = permuted_local_hidden_states, permuted_probs
        experts = [cast(MLP, expert) for expert in self.local_experts]
        if any(map(_has_hooks, experts)) or (rows.is_cuda and not self.config.add_bias_linear):
            return super().forward(rows, tokens_per_expert, probs)
        sizes: list[int] = tokens_per_expert.tolist()
        if self.config.moe_apply_probs_on_input:
            rows, probs = (probs.unsqueeze(-1) * rows).to(rows.dtype), torch.ones_like(probs)
        projected = []
        for expert, own_rows in zip(experts, rows.split(sizes), strict=True):
            product, bias = apply_module(expert.linear_fc1)(own_rows)
            # Megatron's fused SwiGLU with weights takes no bias.
            projected.append(product if bias is None else product + bias)
        activated = _activate(torch.cat(projected), probs, experts[0].config)
        outputs = []
        for expert, own_rows, own_probs in zip(experts, activated.split(sizes), probs.split(sizes), strict=True):
            output, bias = apply_module(expert.linear_fc2)(own_rows)
            outputs.append(output if bias is None else (output + bias * own_probs.unsqueeze(-1)).to(output.dtype))
        return torch.cat(outputs), None


def _has_hooks(expert: MLP) -> bool:
    """Return whether an expert has hooks, which `GroupedMLP` would not call, besides `DistributedDataParallel`'s."""
    return bool(expert._forward_hooks or expert._backward_hooks or expert._backward_pre_hooks) or any(
        not waits_for_parameters(hook) for hook in expert._forward_pre_hooks.values()
    )


def _activate(projected: Tensor, probs: Tensor, config: TransformerConfig) -> Tensor:
    """Apply activation function and row weights as `MLP.forward` does, to [rows, fc1 output] and [rows]."""
    without_layers: Any = SimpleNamespace(config=config, activation_func=config.activation_func)
    without_layers.linear_fc1 = without_layers.linear_fc2 = _PASS_ON
    return MLP.forward(without_layers, projected, probs)[0]


class _PassOn(torch.nn.Module):
    """Stands for a linear layer that is computed elsewhere."""

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        """Return the rows, and None in place of a bias."""
        return rows, None


_PASS_ON = _PassOn()
