"""Experts that are computed together against Megatron-Core's `SequentialMLP`, bit for bit on the CPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from support import small_moe as moe
from support.small_moe import DEVICE
from support.tensors import assert_same_tensors
from torch import Tensor
from torch.nn.functional import gelu

from maskmoe.transformer.experts import GroupedMLP

OTHER_ACTIVATIONS = {
    "fused": {"bias_activation_fusion": True},
    "another": {"activation_func": gelu},
    "not gated": {"gated_linear_unit": False},
    "clamped": {"activation_func_clamp_value": 0.5},
    "offset": {"glu_linear_offset": 1.0},
}
"""Each setting differs from SwiGLU in one respect."""


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


def make_rows(
    experts: SequentialMLP, tokens_per_expert: list[int], seed: int = 0, probs_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows, their weights, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    number, config = sum(tokens_per_expert), experts.config
    shape = number, config.hidden_size
    rows, gradient = (torch.randn(shape, generator=generator).to(DEVICE, config.params_dtype) for _ in range(2))
    probs = torch.rand(number, generator=generator).to(DEVICE, probs_dtype)
    return rows.requires_grad_(), probs.requires_grad_(), gradient


def make_pair(**overrides: Any) -> tuple[GroupedMLP, SequentialMLP]:
    config = moe.make_config(overrides.pop("num_experts", 4), **overrides)
    return make_experts(GroupedMLP, config), make_experts(SequentialMLP, config)


def compute(
    experts: SequentialMLP, tokens_per_expert: list[int], are_inputs_frozen: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """Compute the output and the gradients of all that is not frozen; settings are passed to `make_rows`."""
    rows, probs, gradient = make_rows(experts, tokens_per_expert, **settings)
    inputs = {"rows": rows, "probs": probs}
    for tensor in inputs.values():
        tensor.requires_grad_(not are_inputs_frozen)
    output, bias = experts(rows, torch.tensor(tokens_per_expert), probs)
    assert bias is None
    output.backward(gradient)
    gradients = {name: tensor.grad for name, tensor in (inputs | dict(experts.named_parameters())).items()}
    experts.zero_grad()
    return {"output": output.detach()} | {name: value for name, value in gradients.items() if value is not None}


@given(
    tokens_per_expert=st.lists(st.integers(0, 40) | st.just(0), min_size=2, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    probs_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    on_input=st.booleans(),
)
@example([0, 0, 0], torch.float32, torch.float32, False)
@example([0, 37, 0, 0], torch.bfloat16, torch.float32, False)
@example([3, 0, 5], torch.float32, torch.bfloat16, True)
def test_is_bit_equal(tokens_per_expert, dtype, probs_dtype, on_input) -> None:
    ours, theirs = make_pair(
        num_experts=len(tokens_per_expert),
        topk=1 if on_input else 2,
        params_dtype=dtype,
        moe_apply_probs_on_input=on_input,
    )
    found, expected = (compute(experts, tokens_per_expert, probs_dtype=probs_dtype) for experts in (ours, theirs))
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS.values(), ids=OTHER_ACTIVATIONS)
def test_is_bit_equal_for_other_activations(activation: dict) -> None:
    """Each expert has as many elements as fill whole vectors: torch computes the others by other instructions."""
    ours, theirs = make_pair(**activation)
    assert_same_tensors(compute(ours, [8, 0, 16, 8]), compute(theirs, [8, 0, 16, 8]))


@pytest.mark.parametrize("frozen", ["linear_fc1", "linear_fc2", "local_experts", "local_experts.0", "inputs"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    pair = make_pair()
    for experts in pair:
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_(frozen not in name)
    found, expected = (compute(experts, [2, 0, 3, 4], are_inputs_frozen=frozen == "inputs") for experts in pair)
    assert len(expected) < 1 + 2 + 8
    assert_same_tensors(found, expected)


@pytest.mark.parametrize(
    "settings",
    [{"num_experts": 1, "topk": 1}, {"enable_autocast": True, "autocast_dtype": torch.bfloat16}],
    ids=["one expert", "autocast"],
)
def test_is_bit_equal_with_other_settings(settings: dict) -> None:
    ours, theirs = make_pair(**settings)
    tokens_per_expert = [3] * ours.num_local_experts
    assert_same_tensors(compute(ours, tokens_per_expert), compute(theirs, tokens_per_expert))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [{}, {"activation_func": gelu, "gated_linear_unit": False}], ids=["", "gelu"])
def test_experts_with_biases_are_bit_equal_where_sequential_experts_train(activation, dtype) -> None:
    """Without expert parallelism, autograd refuses the biases that `SequentialMLP` adds in place to views."""
    settings = {"add_bias_linear": True, "params_dtype": dtype, **activation}
    theirs = make_pair(**settings)[1]
    with pytest.raises(RuntimeError, match="modified inplace"):
        compute(theirs, [2, 0, 3, 4])
    for expert in theirs.local_experts:
        expert.linear_fc2.explicit_expert_comm = True  # as with expert parallelism
    ours = make_pair(**settings)[0]
    assert_same_tensors(compute(ours, [2, 0, 3, 4]), compute(theirs, [2, 0, 3, 4]))


@pytest.mark.parametrize(
    "change",
    [
        lambda expert: expert.linear_fc1.register_forward_hook(lambda module, args, output: (output[0] * 2, None)),
        lambda expert: expert.linear_fc2.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda expert: expert.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2, *grads[1:])),
    ],
    ids=["forward hook", "forward pre-hook", "backward hook"],
)
def test_changed_experts_keep_their_changes(change: Callable) -> None:
    ours, theirs = make_pair()
    unchanged = compute(ours, [2, 0, 3, 4])
    for experts in (ours, theirs):
        change(experts.local_experts[2])
    changed = compute(ours, [2, 0, 3, 4])
    assert_same_tensors(changed, compute(theirs, [2, 0, 3, 4]))
    assert not torch.equal(changed["rows"], unchanged["rows"])


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


def _experts_of_rank(config: TransformerConfig, rank: int, num_ranks: int) -> tuple[GroupedMLP, Tensor]:
    """Build the experts of an expert-parallel rank after the same seed; return what the rank draws next, too."""
    torch.manual_seed(0)
    groups = moe.process_groups()
    groups.ep = SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)
    experts = GroupedMLP(config.num_moe_experts // num_ranks, config, SUBMODULES, groups)
    return experts, torch.rand(1)
