"""Experts of the local spec against Megatron-Core's `SequentialMLP`, bit for bit on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from support import small_moe as moe
from support.small_moe import DEVICE
from support.tensors import assert_same_tensors
from torch import Tensor
from torch.nn.functional import gelu

from maskmoe.transformer.experts import LocalExperts

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


def compute(experts: SequentialMLP, tokens_per_expert: list[int]) -> dict[str, Tensor]:
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
