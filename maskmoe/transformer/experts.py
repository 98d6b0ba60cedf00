"""Experts that are computed together: without Transformer Engine, and with it without a wait of the host."""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.transformer.gathered_parameters import wait_for_parameters, waits_for_parameters
from maskmoe.transformer.torch_modules.linear import grouped_linear, linear_in_turns

GROUPED_CAPABILITIES = (9, 10)
"""Major compute capabilities of GPUs for which torch has a kernel of `grouped_mm`: Hopper, data-center Blackwell."""

_GROUPED_GEMM_VARIABLE = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"


class GroupedMLP(SequentialMLP):
    """`SequentialMLP` with the same parameters and checkpoints that computes its experts without calling their modules.

    - On a GPU of compute capability 9 or 10: torch's `grouped_mm` computes each linear layer, and one activation all
      rows. The host does not wait for the device. Needs bf16 and sizes that are multiples of 8.
    - On a CPU: the experts take turns in each linear layer, and one activation computes all rows. The result is
      bit-equal to `SequentialMLP` with SwiGLU. With other activations, torch computes the last elements of a tensor,
      which fill no vector, by other instructions, and the rows of one expert end with other elements than all rows.

    `SequentialMLP` computes the experts where neither applies, if `_can_group` returns False, or if experts were
    changed after they were built, for example by adapters or hooks.

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
        is_grouped = (
            _can_group(self.config, len(experts), self.tp_group.size())
            and all(map(_is_as_built, experts))
            and (not rows.is_cuda or _has_grouped_kernel(rows, experts))
        )
        if not is_grouped and not self.config.add_bias_linear:
            return super().forward(rows, tokens_per_expert, probs)
        if self.config.moe_apply_probs_on_input:
            rows, probs = (probs.unsqueeze(-1) * rows).to(rows.dtype), torch.ones_like(probs)
        if not is_grouped:
            return _compute_one_by_one(rows, tokens_per_expert, probs, experts), None
        # Wait until data parallelism has gathered the weights, as a call of each linear layer would.
        for expert in experts:
            for layer in _linear_layers(expert):
                wait_for_parameters(layer)
        compute = _compute_grouped if rows.is_cuda else _compute_in_turns
        return compute(rows, tokens_per_expert, probs, experts), None


class CountsOnDeviceMLP(TEGroupedMLP):
    """`TEGroupedMLP` that leaves the numbers of rows on the device if Transformer Engine reads them there.

    Transformer Engine 2.19 does so from Hopper on, in bf16, with `NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM=1`, and
    then refuses numbers on the host, to which Megatron-Core brings them in every layer.

    This class ignores the variable if Megatron-Core needs the numbers on the host, to pad rows for FP8 and FP4 or to
    add biases; or if gradients are not added to `main_grad`, because a product of no rows may write no gradient.

    Raises:
        UserError: The variable is set, gradients are not added to `main_grad`, and Transformer Engine is older than
            2.19. Versions 2.17 and 2.18 read the variable in every forward pass, so this class cannot switch it off.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, layers = self.config, cast(tuple[Any, ...], (self.linear_fc1, self.linear_fc2))
        is_old = not hasattr(layers[0], "use_grouped_tensor")
        if is_old and not config.gradient_accumulation_fusion and os.environ.get(_GROUPED_GEMM_VARIABLE, "0") != "0":
            raise UserError(
                f"{_GROUPED_GEMM_VARIABLE}=1 needs gradient accumulation fusion or Transformer Engine 2.19: unset the "
                "variable, leave --no-gradient-accumulation-fusion out, or install a newer Transformer Engine"
            )
        if config.fp8 or config.fp4 or config.add_bias_linear or not config.gradient_accumulation_fusion:
            for layer in layers:
                layer.use_grouped_tensor = False

    def forward(  # pyrefly: ignore[bad-override]  # the arguments that follow are handed on
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor, *buffers: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the output of every expert for its rows; arguments as for `GroupedMLP.forward`."""
        rows = permuted_local_hidden_states
        if self._reads_on_device(rows.dtype):
            # Dispatchers that count rows for the host leave the numbers there.
            tokens_per_expert = tokens_per_expert.to(rows.device, non_blocking=True).as_subclass(_CountsOnDevice)
        return super().forward(rows, tokens_per_expert, permuted_probs, *buffers)

    def _reads_on_device(self, dtype: torch.dtype) -> bool:
        """Return whether both linear layers read the numbers of rows on the device."""
        if not getattr(self.linear_fc1, "use_grouped_tensor", False):
            return False
        from transformer_engine.pytorch.module import (  # pyrefly: ignore[missing-import]
            is_module_grouped_tensor_path_supported,
        )

        return is_module_grouped_tensor_path_supported(None, dtype)


class _CountsOnDevice(Tensor):
    """Numbers of rows that Megatron-Core does not turn into a list."""

    def tolist(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """Return the numbers as a tensor, which Transformer Engine takes instead of a list."""
        return self.as_subclass(Tensor)


def _can_group(config: TransformerConfig, num_local_experts: int, expert_tensor_size: int) -> bool:
    """Return whether there are several local experts, and their linear layers only multiply by their weights."""
    return num_local_experts > 1 and not (
        expert_tensor_size > 1
        # Weights are assembled from shards.
        or config.expert_gtp_weight_remat_size > 1
        # Each expert adds its bias, times the weights of the rows.
        or config.add_bias_linear
        # Linear layers move or cast tensors.
        or config.cpu_offloading
        or config.enable_autocast
    )


def _linear_layers(expert: MLP) -> tuple[ColumnParallelLinear, RowParallelLinear]:
    """Return both linear layers of an expert for which `_is_as_built` holds."""
    return cast(ColumnParallelLinear, expert.linear_fc1), cast(RowParallelLinear, expert.linear_fc2)


def _weights(expert: MLP) -> tuple[Tensor, Tensor]:
    """Return the weights of both linear layers, [fc1 output, hidden] and [hidden, fc2 input]."""
    first, second = _linear_layers(expert)
    assert first.weight is not None
    return first.weight, second.weight


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


def _compute_in_turns(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, experts: Sequence[MLP]) -> Tensor:
    """Compute one expert after the other in each linear layer; arguments as for `GroupedMLP.forward`."""
    sizes: list[int] = tokens_per_expert.tolist()
    first, second = zip(*map(_weights, experts), strict=True)
    activated = _activate(linear_in_turns(rows, sizes, first), probs, experts[0].config)
    return linear_in_turns(activated, sizes, second)


def _compute_one_by_one(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, experts: Sequence[MLP]) -> Tensor:
    """Compute one expert with biases after the other; arguments as for `GroupedMLP.forward`."""
    sizes = tokens_per_expert.tolist()
    outputs = []
    for expert, own_rows, own_probs in zip(experts, rows.split(sizes), probs.split(sizes), strict=True):
        projected, bias = apply_module(expert.linear_fc1)(own_rows)
        # Megatron's fused SwiGLU with weights takes no bias.
        activated = _activate(projected if bias is None else projected + bias, own_probs, expert.config)
        output, bias = apply_module(expert.linear_fc2)(activated)
        outputs.append(output if bias is None else (output + bias * own_probs.unsqueeze(-1)).to(output.dtype))
    return torch.cat(outputs)


def _has_grouped_kernel(rows: Tensor, experts: Sequence[MLP]) -> bool:
    """Return whether `grouped_mm` has a kernel for the device, the dtypes and the sizes.

    Rows must be bf16 with a multiple of 16 bytes. On other devices than Hopper and data-center Blackwell, torch brings
    the bounds of the groups to the host, and computes one group after the other.
    """
    first, second = _weights(experts[0])
    has_fitting_sizes = all(size % 8 == 0 for size in (*first.shape, *second.shape))
    is_bf16 = rows.dtype == first.dtype == torch.bfloat16
    return is_bf16 and has_fitting_sizes and torch.cuda.get_device_capability(rows.device)[0] in GROUPED_CAPABILITIES


def _compute_grouped(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, experts: Sequence[MLP]) -> Tensor:
    """Compute all experts in one product for each linear layer; arguments as for `GroupedMLP.forward`."""
    ends = tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    first, second = zip(*map(_weights, experts), strict=True)
    activated = _activate(grouped_linear(rows, ends, first), probs, experts[0].config)
    return grouped_linear(activated, ends, second)
