"""Experts without Transformer Engine, without a module's forward and copies of rows for each of them."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, silu


class GroupedMLP(SequentialMLP):
    """`SequentialMLP`, of the same parameters and checkpoints, that computes its experts together.

    - bf16 on a GPU: one `grouped_mm` for each linear layer and one activation over all rows. Nothing waits for the
      device.
    - Otherwise, with SwiGLU that is not fused: experts take turns on slices of the rows, and write output and gradients
      in place. Bit-equal to `SequentialMLP`. Of the inside of an expert they keep half as much for the backward pass.

    All else, and where `can_group` says no or experts were changed after they were built, as adapters and hooks do, is
    left to `SequentialMLP`.

    Args: those of `SequentialMLP`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        super().__init__(num_local_experts, config, submodules, pg_collection, name)
        self._can_group = can_group(self.config, num_local_experts, self.tp_group.size())

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What every expert makes of its rows.

        Args:
            permuted_local_hidden_states: [rows, hidden], ordered by expert.
            tokens_per_expert: integers [local experts], on any device.
            permuted_probs: [rows], the weight of each row.

        Returns:
            [rows, hidden] and the bias, None.
        """
        compute = self._way_to_compute(permuted_local_hidden_states)
        if compute is None:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        for linear in _linear_layers(self.local_experts):
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())

        def compute_all(rows: Tensor, probs: Tensor) -> tuple[Tensor, None]:
            return compute(rows, tokens_per_expert, probs, self.local_experts), None

        # To SequentialMLP all experts are as one; where weights are to be applied to the input, it does so.
        as_one = SimpleNamespace(config=self.config, num_local_experts=1, local_experts=[compute_all])
        return SequentialMLP.forward(as_one, permuted_local_hidden_states, tokens_per_expert, permuted_probs)

    def _way_to_compute(self, rows: Tensor) -> Callable[..., Tensor] | None:
        """How to compute the experts together; None if they are not to be."""
        if not self._can_group or not all(map(_is_as_built, self.local_experts)):
            return None
        if _is_fit_for_grouped_mm(rows, self.local_experts):
            return _compute_grouped
        return _compute_in_turns if _is_swiglu(self.config) else None


def can_group(config: TransformerConfig, num_local_experts: int, expert_tensor_size: int) -> bool:
    """Whether there are several experts, and all that their linear layers do is to multiply by their weights.

    Args:
        config: of the experts.
        num_local_experts: on this rank.
        expert_tensor_size: ranks that share each of them.
    """
    return num_local_experts > 1 and not (
        expert_tensor_size > 1
        # Weights are put together from their shards.
        or config.expert_gtp_weight_remat_size > 1
        # Each expert adds its own, times the weights of the rows.
        or config.add_bias_linear
        # Kernels of Apex and Transformer Engine.
        or config.gradient_accumulation_fusion
        or config.use_te_activation_func
        or config.fp8
        or config.fp4
        # Linear layers look for what is to be moved or cast.
        or config.cpu_offloading
        or config.enable_autocast
    )


def _is_swiglu(config: TransformerConfig) -> bool:
    """Whether the activation is SwiGLU alone, in Megatron's form that is not fused."""
    return (
        config.gated_linear_unit
        and config.activation_func is silu
        and not config.bias_activation_fusion
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
    )


def _linear_layers(experts: torch.nn.ModuleList) -> Iterator[torch.nn.Module]:
    for expert in experts:
        yield expert.linear_fc1
        yield expert.linear_fc2


def _is_as_built(expert: MLP) -> bool:
    """Whether an expert's linear layers are Megatron's own, and nobody asks what goes in and comes out."""
    return (
        type(expert.linear_fc1) is ColumnParallelLinear
        and type(expert.linear_fc2) is RowParallelLinear
        and not any(map(_has_hooks, (expert, expert.linear_fc1, expert.linear_fc2)))
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has other hooks than those that wait for its parameters to be gathered.

    `DistributedDataParallel` sets these. They do not look at the input, so they need no call of the module.
    """
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks) or any(
        hook.__module__ != DistributedDataParallel.__module__ for hook in module._forward_pre_hooks.values()
    )


def _is_fit_for_grouped_mm(rows: Tensor, experts: torch.nn.ModuleList) -> bool:
    weights = [experts[0].linear_fc1.weight, experts[0].linear_fc2.weight]
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        # Rows of matrices begin at multiples of 16 bytes.
        and all(size % 8 == 0 for weight in weights for size in weight.shape)
        and len(rows) > 0
    )


def _compute_grouped(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, experts: torch.nn.ModuleList) -> Tensor:
    ends = tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    between = _BetweenLinearLayers(experts[0])
    rows = _GroupedProduct.apply(rows, ends, *(expert.linear_fc1.weight for expert in experts))
    return _GroupedProduct.apply(between(rows, probs), ends, *(expert.linear_fc2.weight for expert in experts))


class _BetweenLinearLayers:
    """What `MLP.forward` does between its linear layers, to rows [rows, fc1 output] with weights [rows].

    Args:
        mlp: any of the experts.
    """

    def __init__(self, mlp: MLP):
        self.config = mlp.config
        self.activation_func = mlp.activation_func
        self.linear_fc1 = self.linear_fc2 = _PassOn()

    def __call__(self, rows: Tensor, probs: Tensor) -> Tensor:
        return MLP.forward(self, rows, probs)[0]


class _PassOn(torch.nn.Module):
    """Stands in the place of a linear layer that is computed elsewhere."""

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        return rows, None


class _GroupedProduct(torch.autograd.Function):
    """Rows [rows, in], ordered by expert, times the weights [out, in] of the experts: [rows, out].

    The kernel wants weights in one tensor. It is as large as they are, so it is made for each product and not kept.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends, *weights)
        return grouped_mm(rows, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows = grouped_mm(gradient, torch.stack(weights), offs=ends)
        of_weights = grouped_mm(gradient.t(), rows.contiguous(), offs=ends)  # [experts, out, in]
        return of_rows, None, *of_weights.unbind()


def _compute_in_turns(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, experts: torch.nn.ModuleList) -> Tensor:
    sizes = tokens_per_expert.tolist()
    output, gradient = _Whole(rows), _Whole(rows)
    parts = zip(_Split.apply(rows, gradient, sizes), probs.split(sizes), _slices(sizes), strict=True)
    outputs = []
    for expert, (part, part_probs, own) in zip(experts, parts, strict=True):
        projected = _FirstLayer.apply(part, expert.linear_fc1.weight, gradient, own)
        outputs.append(_SecondLayer.apply(projected, part_probs, expert.linear_fc2.weight, output, own))
    return _Join.apply(output, sizes, *outputs)


def _slices(sizes: list[int]) -> Iterator[slice]:
    begin = 0
    for size in sizes:
        yield slice(begin, begin := begin + size)


class _Whole:
    """A tensor that experts write part by part, instead of parts that are copied together.

    Args:
        like: has its shape, type and device.
    """

    def __init__(self, like: Tensor):
        self._like = like.detach()
        self._whole: Tensor | None = None

    def part(self, own: slice) -> Tensor:
        if self._whole is None:
            self._whole = self._like.new_empty(self._like.shape)
        # Autograd is not to take the parts for views of one tensor: then none could be written after another.
        return self._whole.data[own]

    def take(self) -> Tensor:
        whole, self._whole = self._whole, None
        return whole


class _Split(torch.autograd.Function):
    """`torch.split`; the gradients of the parts are parts of one tensor already."""

    @staticmethod
    def forward(ctx, rows: Tensor, gradient: _Whole, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.gradient = gradient
        return rows.split(sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *of_parts: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient.take(), None, None


class _Join(torch.autograd.Function):
    """`torch.cat` of parts that are parts of one tensor already."""

    @staticmethod
    def forward(ctx, whole: _Whole, sizes: list[int], *parts: Tensor) -> Tensor:
        ctx.sizes = sizes
        return whole.take()

    @staticmethod
    @once_differentiable
    def backward(ctx, of_whole: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *of_whole.split(ctx.sizes)


class _FirstLayer(torch.autograd.Function):
    """Rows [rows, hidden] of one expert times its weight [2 ffn, hidden]."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, gradient: _Whole, own: slice) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.gradient, ctx.own = gradient, own
        return rows.mm(weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, of_projected: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = torch.mm(of_projected, weight, out=ctx.gradient.part(ctx.own))
        if ctx.needs_input_grad[1]:
            of_weight = of_projected.t().mm(rows.contiguous())
        return of_rows, of_weight, None, None


class _SecondLayer(torch.autograd.Function):
    """SwiGLU of [rows, 2 ffn], times the weights of the rows [rows], times the expert's weight [hidden, ffn].

    Operations and their order are those of `MLP.forward` and its derivative. Products are computed again rather than
    kept.
    """

    @staticmethod
    def forward(ctx, projected: Tensor, probs: Tensor, weight: Tensor, output: _Whole, own: slice) -> Tensor:
        gate, value = projected.chunk(2, dim=-1)
        activated = silu(gate)
        weighted = (activated * value).mul_(probs.unsqueeze(-1))
        ctx.save_for_backward(projected, activated, probs, weight)
        return torch.mm(weighted, weight.t(), out=output.part(own))

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output: Tensor) -> tuple[Tensor | None, ...]:
        projected, activated, probs, weight = ctx.saved_tensors
        gate, value = projected.chunk(2, dim=-1)
        product = activated * value
        # Where weights of rows are of a higher precision, gradients are as far as to the product.
        of_product = of_output.mm(weight).to(torch.result_type(product, probs))
        of_probs = (of_product * product).sum(dim=-1)
        weighted = product.mul_(probs.unsqueeze(-1))
        of_product = of_product.mul_(probs.unsqueeze(-1)).to(product.dtype)
        of_projected = torch.empty_like(projected)
        of_gate, of_value = of_projected.chunk(2, dim=-1)
        torch.mul(of_product, activated, out=of_value)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(value), gate, grad_input=of_gate)
        of_weight = of_output.contiguous().t().mm(weighted) if ctx.needs_input_grad[2] else None
        return of_projected, of_probs, of_weight, None, None
