"""Experts without Transformer Engine, whose activation functions are computed together on a CPU."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.nn.functional import linear

from maskmoe.transformer.gathered_parameters import wait_for_parameters, waits_for_parameters


class GroupedMLP(SequentialMLP):
    """`SequentialMLP` with the same parameters and checkpoints that computes all activations at once on a CPU.

    The experts take turns in each linear layer, and one activation computes all rows. The result is bit-equal to
    `SequentialMLP` with SwiGLU. With other activations, torch computes the last elements of a tensor, which fill no
    vector, by other instructions, and the rows of one expert end with other elements than all rows.

    `SequentialMLP` computes the experts on a GPU, if `_can_group` returns False, or if experts were changed after they
    were built, for example by adapters or hooks.

    Experts with biases are computed one by one. `SequentialMLP` adds biases in place, which autograd forbids without
    expert parallelism, because the outputs of the linear layers are views.
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
        has_biases = self.config.add_bias_linear
        is_grouped = (
            not rows.is_cuda
            and _can_group(self.config, len(experts), self.tp_group.size())
            and all(map(_is_as_built, experts))
        )
        if not is_grouped and not has_biases:
            return super().forward(rows, tokens_per_expert, probs)
        if self.config.moe_apply_probs_on_input:
            rows, probs = (probs.unsqueeze(-1) * rows).to(rows.dtype), torch.ones_like(probs)
        compute = _compute_one_by_one if has_biases else _compute_in_turns
        return compute(rows, tokens_per_expert.tolist(), probs, experts), None


def _can_group(config: TransformerConfig, num_local_experts: int, expert_tensor_size: int) -> bool:
    """Return whether there are several local experts, and their linear layers only multiply by their weights."""
    return num_local_experts > 1 and not (
        expert_tensor_size > 1
        # Weights are assembled from shards.
        or config.expert_gtp_weight_remat_size > 1
        # Each expert adds its bias, times the weights of the rows.
        or config.add_bias_linear
        # Linear layers cast tensors.
        or config.enable_autocast
    )


def _linear_layers(expert: MLP) -> tuple[ColumnParallelLinear, RowParallelLinear]:
    """Return both linear layers of an expert for which `_is_as_built` holds."""
    return cast(ColumnParallelLinear, expert.linear_fc1), cast(RowParallelLinear, expert.linear_fc2)


def _is_as_built(expert: MLP) -> bool:
    """Return whether an expert's linear layers are Megatron's own and no hook reads inputs or outputs."""
    return (
        type(expert.linear_fc1) is ColumnParallelLinear
        and type(expert.linear_fc2) is RowParallelLinear
        and not any(map(_has_hooks, (expert, *_linear_layers(expert))))
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    """Return whether a module has hooks besides those of `DistributedDataParallel`.

    `GroupedMLP` calls the hooks of `DistributedDataParallel` without calling the module, see `wait_for_parameters`.
    """
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks) or any(
        not waits_for_parameters(hook) for hook in module._forward_pre_hooks.values()
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


def _compute_in_turns(rows: Tensor, sizes: list[int], probs: Tensor, experts: Sequence[MLP]) -> Tensor:
    """Compute one expert after the other in each linear layer, with one activation between the linear layers.

    `sizes` are the numbers of rows of each expert; the other arguments are those of `GroupedMLP.forward`.
    """
    # Wait until data parallelism has gathered the weights, as a call of each linear layer would.
    for expert in experts:
        for layer in _linear_layers(expert):
            wait_for_parameters(layer)
    first, second = zip(*map(_linear_layers, experts), strict=True)
    activated = _activate(_multiply(rows, sizes, first), probs, experts[0].config)
    return _multiply(activated, sizes, second)


def _multiply(rows: Tensor, sizes: list[int], layers: Sequence[Any]) -> Tensor:
    """Multiply the rows [rows, inputs] of each expert by the weight of its linear layer: [rows, outputs]."""
    of_experts = zip(rows.split(sizes), layers, strict=True)
    return torch.cat([linear(own_rows, layer.weight) for own_rows, layer in of_experts])


def _compute_one_by_one(rows: Tensor, sizes: list[int], probs: Tensor, experts: Sequence[MLP]) -> Tensor:
    """Compute one expert with biases after the other; arguments as for `_compute_in_turns`."""
    outputs = []
    for expert, own_rows, own_probs in zip(experts, rows.split(sizes), probs.split(sizes), strict=True):
        projected, bias = apply_module(expert.linear_fc1)(own_rows)
        # Megatron's fused SwiGLU with weights takes no bias.
        activated = _activate(projected if bias is None else projected + bias, own_probs, expert.config)
        output, bias = apply_module(expert.linear_fc2)(activated)
        outputs.append(output if bias is None else (output + bias * own_probs.unsqueeze(-1)).to(output.dtype))
    return torch.cat(outputs)
