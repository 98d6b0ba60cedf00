"""Experts against Megatron-Core's `SequentialMLP` and `TEGroupedMLP`, bit for bit on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from support import small_moe as moe
from support.small_moe import DEVICE
from support.tensors import assert_same_tensors
from torch import Tensor
from torch.nn.functional import gelu

from maskmoe.errors import UserError
from maskmoe.transformer.experts import CountsOnDeviceMLP, LocalExperts

# Of the local spec.
SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def make_experts[Experts: SequentialMLP](kind: type[Experts], config: TransformerConfig) -> Experts:
    """Build experts of the local spec, with weights that depend on the configuration only."""
    experts = kind(config.num_moe_experts, config, SUBMODULES, moe.process_groups()).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def compute(experts: SequentialMLP | TEGroupedMLP, tokens_per_expert: list[int]) -> dict[str, Tensor]:
    """Compute the output and all gradients for random rows."""
    generator = torch.Generator().manual_seed(0)
    number, config = sum(tokens_per_expert), experts.config
    shape = number, config.hidden_size
    rows, gradient = (torch.randn(shape, generator=generator).to(DEVICE, config.params_dtype) for _ in range(2))
    probs = torch.rand(number, generator=generator).to(DEVICE)
    inputs = {"rows": rows.requires_grad_(), "probs": probs.requires_grad_()}
    output, bias = experts(rows, torch.tensor(tokens_per_expert), probs)
    assert bias is None
    output.backward(gradient)
    return {"output": output.detach()} | {
        name: tensor.grad for name, tensor in (inputs | dict(experts.named_parameters())).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [{}, {"activation_func": gelu, "gated_linear_unit": False}], ids=["", "gelu"])
def test_experts_with_biases_are_bit_equal_where_sequential_experts_train(activation, dtype) -> None:
    """Without expert parallelism, autograd refuses the biases that `SequentialMLP` adds in place to views."""
    config = moe.make_config(4, add_bias_linear=True, params_dtype=dtype, **activation)
    theirs = make_experts(SequentialMLP, config)
    with pytest.raises(RuntimeError, match="modified inplace"):
        compute(theirs, [2, 0, 3, 4])
    theirs = make_experts(SequentialMLP, config)
    for expert in theirs.local_experts:
        expert.linear_fc2.explicit_expert_comm = True  # as with expert parallelism
    ours = make_experts(LocalExperts, config)
    assert_same_tensors(compute(ours, [2, 0, 3, 4]), compute(theirs, [2, 0, 3, 4]))


def test_weights_do_not_depend_on_expert_parallelism() -> None:
    """On a CPU, all ranks draw the same random numbers, so ranks that drew their experts only would have equal ones."""
    config = moe.make_config(4, use_cpu_initialization=True)
    whole, drawn_after = _experts_of_rank(config, rank=0, num_ranks=1)
    shares = [_experts_of_rank(config, rank, num_ranks=2) for rank in range(2)]
    assert [experts.num_local_experts for experts, _ in shares] == [2, 2]
    experts = [expert for experts, _ in shares for expert in experts.local_experts]
    for ours, theirs in zip(experts, whole.local_experts, strict=True):
        assert_same_tensors(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert all(torch.equal(drawn, drawn_after) for _, drawn in shares)


def _experts_of_rank(config: TransformerConfig, rank: int, num_ranks: int) -> tuple[LocalExperts, Tensor]:
    """Build the experts of an expert-parallel rank after the same seed; return what the rank draws next, too."""
    torch.manual_seed(0)
    groups = moe.process_groups()
    groups.ep = SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)
    experts = LocalExperts(config.num_moe_experts // num_ranks, config, SUBMODULES, groups)
    return experts, torch.rand(1)


class GroupedLinear(torch.nn.Module):
    """Stands for Transformer Engine's grouped linear layer, which reads the numbers of rows as a tensor or a list."""

    use_grouped_tensor = False

    def __init__(self, num_experts: int, input_size: int, output_size: int, **unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_experts, input_size, output_size))

    def forward(self, rows: Tensor, counts: Tensor | list[int]) -> tuple[Tensor, None]:
        """Multiply the rows of each expert by the expert's weight."""
        assert type(counts) is (Tensor if self.use_grouped_tensor else list)
        parts = rows.split(counts.tolist() if isinstance(counts, Tensor) else counts)
        return torch.cat([part @ weight for part, weight in zip(parts, self.weight, strict=True)]), None


def make_grouped(kind: type[TEGroupedMLP], linear: type[torch.nn.Module] = GroupedLinear, **settings) -> TEGroupedMLP:
    """Build grouped experts whose linear layers are stand-ins."""
    config = moe.make_config(4, **settings)
    torch.manual_seed(0)
    experts = kind(4, config, GroupedMLPSubmodules(linear_fc1=linear, linear_fc2=linear), moe.process_groups())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_counts_of_rows_stay_on_the_device() -> None:
    counts = [2, 0, 3, 4]
    ours, theirs = make_grouped(CountsOnDeviceMLP), make_grouped(TEGroupedMLP)
    assert_same_tensors(compute(ours, counts), compute(theirs, counts))


class OlderGroupedLinear(GroupedLinear):
    """Stands for the layer of Transformer Engine 2.18."""

    use_grouped_tensor = property()


@pytest.mark.parametrize(
    ("linear", "settings"), [(OlderGroupedLinear, {}), (GroupedLinear, {"add_bias_linear": True})], ids=["old", "bias"]
)
def test_counts_that_are_needed_on_the_host_are_refused(linear, settings) -> None:
    with pytest.raises(UserError, match="--moe-counts-on-device"):
        make_grouped(CountsOnDeviceMLP, linear, **settings)
