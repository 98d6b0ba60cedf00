"""The flex dispatcher with stand-ins for its libraries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.transformer_config import TransformerConfig
from support import flex_libraries
from support.launchers import RunRanks
from support.small_moe import (
    draw_parameters,
    initialize_parallelism,
    make_config,
    make_layer,
    make_mask,
    process_groups,
    random_visible_sets,
)
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.dispatch.flex import missing_library, select_slots
from maskmoe.transformer.dispatch.stock import StockDispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, TOPK, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN = 8, 3, 9, 12, 4, 16
HAS_NCCL_EP = hasattr(TransformerConfig, "moe_ncclep_static_shape")  # the interface of Megatron-Core 0.19
EXPERT = {"expert_model_parallel_size": 2}
EXPERT_TENSOR = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
NO_OVERLAP = {"moe_shared_expert_overlap": False}
BACKENDS: dict[str, dict[str, Any]] = {
    "deepep": {},
    "hybridep": {},
    # No rank receives more than all rows.
    **({"ncclep": {"moe_expert_rank_capacity_factor": 8.0}} if HAS_NCCL_EP else {}),
}


@dataclass(frozen=True)
class Case:
    """A mask and a layer.

    Attributes:
        sizes: Sizes of the visible sets.
        num_visible: The ids see only the first experts, this many.
        settings: Settings of the configuration.
        router_scale: Factor of the router's weights. Weights of selected experts are rounded to 0 if it is large.
        uneven: The ranks have different numbers of tokens.
    """

    sizes: tuple[int, ...] = (1, 2, 3, 8)
    num_visible: int = NUM_EXPERTS
    settings: Mapping[str, Any] = field(default_factory=dict)
    router_scale: float = 1
    uneven: bool = False


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
OVERLAPPED = "overlapped shared experts"
CASES = {
    "softmax": Case(),
    "weights of 0": Case(router_scale=1000),
    "sigmoid and expert bias": Case(settings=SIGMOID),
    "sigmoid and expert bias, weights of 0": Case(settings=SIGMOID, router_scale=1000),
    "last rank starves": Case(sizes=(1, 2, 4), num_visible=4),
    "one expert per token": Case(sizes=(1,)),
    # Some tokens keep no expert.
    "capacity": Case(settings={"moe_expert_capacity_factor": 0.3}),
    OVERLAPPED: Case(settings={"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": True}),
    "uneven ranks": Case(settings={"moe_hybridep_pad_uneven_dispatch_inputs": True}, uneven=True),
    "recomputed": Case(settings={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
}


@dataclass(frozen=True)
class Outcome:
    """The results of one forward and backward pass on one rank.

    Attributes:
        tensors: Output and gradients.
        weights: [tokens, experts].
        routing_map: bool [tokens, experts].
        tokens_per_expert: The rows of the local experts.
    """

    tensors: list[Tensor]
    weights: Tensor
    routing_map: Tensor
    tokens_per_expert: Tensor


def build(case: Case, layout: Mapping[str, int], **settings: Any) -> MaskMoELayer:
    """Build a layer whose parameters depend on the rank and the case only."""
    visible = np.zeros((1, VOCAB_SIZE, NUM_EXPERTS), bool)
    visible[..., : case.num_visible] = random_visible_sets(5, 1, VOCAB_SIZE, case.num_visible, case.sizes)
    config = make_config(
        NUM_EXPERTS,
        TOPK,
        hidden_size=HIDDEN,
        sequence_parallel=layout is EXPERT_TENSOR,
        **layout,
        **{**case.settings, **settings},
    )
    layer = make_layer(config, make_mask(visible))
    draw_parameters(layer)
    with torch.no_grad():
        layer.router.weight.mul_(case.router_scale)
        for parameter in layer.experts.parameters():
            parameter.mul_(1 + torch.distributed.get_rank() / 8)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(torch.linspace(-0.5, 0.5, NUM_EXPERTS))
    return layer


def build_flex(case: Case, layout: Mapping[str, int], backend: str, **settings: Any) -> MaskMoELayer:
    """Build the layer of `build` with the flex dispatcher."""
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    layer = build(case, layout, **flex, **BACKENDS[backend], **settings)
    assert isinstance(layer.dispatcher, StockDispatcher)
    return layer


def run(layer: MaskMoELayer, case: Case) -> Outcome:
    """Run a layer forward and backward on random tokens of this rank."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    sequence = SEQUENCE + rank * case.uneven
    token_ids = pack_token_ids(TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, sequence))))
    input, gradient = torch.randn(2, sequence, BATCH, HIDDEN).to(layer.config.params_dtype)
    routed: list[tuple[Tensor, Tensor]] = []
    rows: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output))
    layer.experts.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[1]))
    output, _ = layer(input.requires_grad_(), padding_mask=token_ids)
    output.backward(gradient)
    tensors = [output.detach(), input.grad, *(parameter.grad for parameter in layer.parameters())]
    weights, routing_map = routed[0]
    return Outcome(tensors, weights.detach(), routing_map, rows[0])


def rows_of_all_experts(outcome: Outcome) -> list[int]:
    """Return the number of tokens of all ranks that select each expert."""
    selected = outcome.routing_map.sum(dim=0)
    torch.distributed.all_reduce(selected)
    return selected.tolist()


def compare(name: str, backend: str, layout: Mapping[str, int] = EXPERT, tolerance: float = 0, **settings: Any) -> None:
    """Compare the flex dispatcher with another way to dispatch.

    With expert parallelism alone, sums have the same order on both sides, so all bits are equal: DeepEP adds up each
    rank's experts first, as one-copy dispatch does. The stand-ins of the other libraries add up in the order of the
    experts, as Megatron's all-to-all does.

    Args:
        name: The case.
        backend: The library.
        layout: How the ranks divide the layer.
        tolerance: Allowed difference, relative to the largest value.
        settings: Further settings of the configuration.
    """
    case = CASES[name]
    reference, flex = build(case, layout, **settings, **NO_OVERLAP), build_flex(case, layout, backend, **settings)
    kind = DispatchKind.ONE_COPY if backend == "deepep" and layout is EXPERT else DispatchKind.STOCK
    reference.dispatcher = build_dispatcher(kind, reference, process_groups())
    expected, outcome = run(reference, case), run(flex, case)
    for value, expected_value in zip(outcome.tensors, expected.tensors, strict=True):
        atol = tolerance * expected_value.abs().max().item()
        torch.testing.assert_close(value, expected_value, rtol=0, atol=atol, msg=lambda m: f"{name}, {backend}: {m}")
    # Every expert gets one row for each token that selects the expert.
    first, num_local = flex.local_expert_indices[0], flex.num_local_experts
    assert outcome.tokens_per_expert.tolist() == rows_of_all_experts(outcome)[first : first + num_local]
    # The case has what its name says.
    num_selected = outcome.routing_map.sum(dim=1)
    assert (num_selected == 1).any()
    assert (num_selected == 0).any() == (name == "capacity")
    assert (outcome.weights[outcome.routing_map] == 0).any() == (case.router_scale > 1)


def compare_on_rank() -> None:
    flex_libraries.install()
    for layout in (EXPERT, EXPERT_TENSOR):
        initialize_parallelism(**layout)
        if layout is EXPERT:
            for backend in BACKENDS:
                for name in CASES:
                    # With overlap, autograd adds up the gradients of the input in another order.
                    compare(name, backend, tolerance=1e-6 if name == OVERLAPPED else 0)
        else:
            # The sums over tensor-parallel ranks and over experts are made in another order.
            for backend in BACKENDS:
                compare("softmax", backend, layout, tolerance=1e-6)
        for backend in BACKENDS:
            # Megatron's all-to-all also adds up in bf16, whose numbers are 2^-8 apart.
            compare("softmax", backend, layout, tolerance=2**-6, bf16=True, params_dtype=torch.bfloat16)
        for backend in ("deepep", "hybridep"):
            # The stand-ins refuse padding, so this also shows that the fuser's alignment reaches no library.
            fused = {"use_transformer_engine_op_fuser": True, "bf16": True, "params_dtype": torch.bfloat16}
            compare("softmax", backend, layout, tolerance=2**-6, **fused)
        parallel_state.destroy_model_parallel()


def test_equals_other_ways_to_dispatch(tmp_path: Path, run_ranks: RunRanks) -> None:
    run_ranks(compare_on_rank, tmp_path)


@given(
    num_selected=st.lists(st.integers(0, 4), max_size=6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_slots_hold_the_selected_experts(num_selected: list[int], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank_of_expert = torch.rand(len(num_selected), 6, generator=generator).argsort(dim=1)
    routing_map = rank_of_expert < torch.tensor(num_selected, dtype=torch.int64).unsqueeze(1)
    # Half of the weights are 0, those of selected experts, too.
    probs = (torch.rand(routing_map.shape, generator=generator) - 0.5).relu().to(dtype) * routing_map
    probs.requires_grad_()
    weights, experts = select_slots(routing_map, probs, 4)
    assert (weights.dtype, experts.dtype) == (dtype, torch.int64)
    assert weights.shape == experts.shape == (len(num_selected), 4)
    assert torch.equal(flex_libraries.multihot(experts, 6), routing_map)
    assert torch.equal(flex_libraries.multihot(experts, 6, weights), probs)
    weights.sum().backward()
    assert torch.equal(probs.grad, routing_map.to(dtype))


def bootstrap_of_later_version(num_topk: int) -> None: ...


def dispatch_of_earlier_version(buffer: Any, tokens: Tensor) -> None: ...


@pytest.mark.parametrize(
    "changed",
    [
        {"ep_bootstrap": bootstrap_of_later_version},
        {"ep_dispatch": dispatch_of_earlier_version},
        {"tex": None},
    ],
    ids=["later", "earlier", "built without NCCL-EP"],
)
def test_transformer_engine_must_fit_megatron(
    changed: dict[str, Callable | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_a2a, "HAVE_TE_EP", True)
    monkeypatch.setattr(fused_a2a, "te_ep", flex_libraries.te_ep, raising=False)
    for name, value in changed.items():
        monkeypatch.setattr(flex_libraries.te_ep, name, value)
    assert missing_library("ncclep") is not None
