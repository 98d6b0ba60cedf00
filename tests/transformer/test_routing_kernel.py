"""The kernel of the router, in Triton's interpreter, against the router in plain torch.

The interpreter cannot show how a GPU rounds.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support.kernels import kernels_on_cpu
from support.router_cases import ALL_BALANCING_LOSSES, LOSSES, SCORES, Case, cases
from support.small_moe import (
    DEVICE,
    draw_parameters,
    make_config,
    make_layer,
    make_mask,
    make_router,
    random_visible_sets,
    take_metrics,
)
from torch import Tensor

from maskmoe.transformer.kernels import launching
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
"""Both sides compute in float32, and add in different orders."""
BF16_TOLERANCE = {"rtol": 2**-7, "atol": 1e-6}
"""The kernel computes in float32 and converts its results once. Triton's interpreter truncates, a GPU rounds."""

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True, scope="module")
def _loss_scale() -> Iterator[None]:
    """Set the scale of the auxiliary losses' gradients, and restore it."""
    with patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(0.5, device=DEVICE)):
        yield


@dataclass(frozen=True)
class Outcome:
    """The results of a router for one micro-batch."""

    probs: Tensor
    routing_map: Tensor
    grad: Tensor
    losses: dict[str, Tensor]
    statistics: Tensor
    load: Tensor | None


def distinct_logits(case: Case) -> Tensor:
    """Draw logits [sequence, batch, experts] in ±4 of which no two are equal, also as bfloat16."""
    rng = np.random.default_rng(case.seed)
    shape, num_experts = case.shape, case.num_experts
    order = rng.permuted(np.broadcast_to(np.arange(num_experts), (*shape, num_experts)), axis=-1)
    values = (order + rng.uniform(0, 0.5, order.shape)) * (8 / num_experts) - 4
    return torch.from_numpy(values).to(DEVICE, case.dtype)


def run(case: Case, logits: Tensor, output_grad: Tensor, uses_kernel: bool) -> Outcome:
    """Route, forward and backward."""
    router, token_ids = case.router(), case.token_ids
    logits = logits.detach().clone().requires_grad_()
    take_metrics()
    if uses_kernel:  # Strides of a transposed tensor, as in a model.
        is_padding = None if token_ids.is_padding is None else token_ids.is_padding.t().contiguous()
        token_ids = TokenIds(token_ids.ids.t().contiguous(), is_padding).transpose()
    with kernels_on_cpu() if uses_kernel else nullcontext():
        probs, routing_map = router.routing(logits, token_ids)
        probs.backward(output_grad.to(probs.dtype))
    assert probs.dtype == logits.dtype
    statistics, _ = router.statistics.take()
    return Outcome(probs.detach(), routing_map, logits.grad, take_metrics(), statistics, router.local_tokens_per_expert)


def check_equals_torch(case: Case) -> None:
    logits = distinct_logits(case)
    output_grad = torch.randn(logits.flatten(0, 1).shape, generator=torch.Generator().manual_seed(case.seed))
    output_grad = output_grad.to(DEVICE, case.dtype)
    ours = run(case, logits, output_grad, uses_kernel=True)
    expected = run(case, logits.float(), output_grad.float(), uses_kernel=False)
    tolerance = (TOLERANCE if case.dtype == torch.float32 else BF16_TOLERANCE) | {"check_dtype": False}
    assert torch.equal(ours.routing_map, expected.routing_map)
    torch.testing.assert_close(ours.probs, expected.probs, **tolerance)
    torch.testing.assert_close(ours.grad, expected.grad, **tolerance)
    assert ours.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        torch.testing.assert_close(ours.losses[name], loss, **TOLERANCE)
    is_count = torch.ones_like(ours.statistics, dtype=torch.bool)
    is_count[2] = False  # the entropy
    assert torch.equal(ours.statistics[is_count], expected.statistics[is_count])
    torch.testing.assert_close(ours.statistics, expected.statistics, **TOLERANCE)
    assert (ours.load is None and expected.load is None) or torch.equal(ours.load, expected.load)


@settings(max_examples=50)
@given(case=cases(dtypes=(torch.float32, torch.bfloat16)))
# Several blocks of tokens, numbers of experts that are no powers of two, group-limited routing as in DeepSeek-V3.
@example(case=Case(1, 512, 16, (3, 2), "softmax_before", "all"))
@example(case=Case(2, 100, 6, (20, 3), "softmax_after", "routable", has_padding=True))
@example(case=Case(6, 16, 8, (20, 3), "softmax_after", "all", groups=(4, 2)))
@example(case=Case(3, 256, 8, (5, 2), "sigmoid_with_bias", "all", groups=(8, 4)))
@example(case=Case(4, 3, 2, (90, 2), "sqrtsoftplus", "all", has_padding=True))
def test_equals_plain_torch(case: Case) -> None:
    check_equals_torch(case)


@settings(max_examples=15)
@given(case=cases(), factor=st.sampled_from([0.5, 2.5]))
def test_scaled_weights(case: Case, factor: float) -> None:
    make = Case.router

    def scaled(case: Case) -> MaskMoERouter:
        router = make(case)
        router.config.moe_router_topk_scaling_factor = factor
        return router

    with patch.object(Case, "router", scaled):
        check_equals_torch(case)


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("scores", SCORES)
def test_visible_sets_of_every_size(scores: str, has_padding: bool) -> None:
    """Tokens see 1, k - 1, k or all experts; one shared table."""
    case = Case(5, 12, 4, (4, 3), scores, "all", has_padding=has_padding)
    mask = make_mask(random_visible_sets(5, 1, 12, 12, sizes=(1, 3, 4, 12)), num_layers=2)
    with patch.object(Case, "mask", mask):
        check_equals_torch(case)


@pytest.mark.parametrize("scores", SCORES)
def test_lowest_index_wins_a_tie(scores: str) -> None:
    case = Case(0, 12, 3, (6, 2), scores, "all")
    with kernels_on_cpu():
        router = case.router()
        if router.expert_bias is not None:
            router.expert_bias.zero_()
        logits = torch.zeros(*case.shape, 12, device=DEVICE)
        logits[..., ::2] *= -1  # -0 equals 0.
        _, routing_map = router.routing(logits, case.token_ids)
    assert torch.equal(routing_map, case.visible & (case.visible.cumsum(dim=1) <= 3))


def test_same_bits_twice() -> None:
    case = Case(3, 512, 8, (9, 2), "softmax_after", "routable", has_padding=True)
    logits = distinct_logits(case)
    first, second = (run(case, logits, torch.ones_like(logits).flatten(0, 1), uses_kernel=True) for _ in range(2))
    for name in ("probs", "routing_map", "grad", "statistics"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for name, losses in first.losses.items():
        assert torch.equal(losses, second.losses[name]), name


def test_no_tokens() -> None:
    router = make_router(make_config(6, 2), make_mask(random_visible_sets(0, 1, 10, 6)))
    hidden = torch.zeros(0, 1, 8, device=DEVICE, requires_grad=True)
    with kernels_on_cpu():
        probs, routing_map = router(hidden, TokenIds(torch.zeros(0, 1, dtype=torch.int64, device=DEVICE)))
        probs.sum().backward()
    assert probs.shape == routing_map.shape == (0, 6)
    assert torch.equal(router.weight.grad, torch.zeros_like(router.weight))
    statistics, _ = router.statistics.take()
    assert not statistics.any()


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    from triton.runtime import interpreter

    router = make_router(make_config(), make_mask(random_visible_sets(0, 1, 10, 4)))
    asserting = replace(interpreter.interpreter_builder.options, debug=True)
    with kernels_on_cpu(), patch.object(interpreter.interpreter_builder, "options", asserting):
        router(torch.randn(1, 1, 8), TokenIds(torch.tensor([[9]])))
        with pytest.raises(interpreter.InterpreterError, match="beyond the vocabulary"):
            router(torch.randn(1, 1, 8), TokenIds(torch.tensor([[10]])))


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(
    ("overrides", "is_supported"),
    [
        ({}, True),
        ({"moe_router_dtype": None}, True),
        ({"moe_router_dtype": "fp64"}, False),
        ({"moe_expert_capacity_factor": 1.0}, False),
    ],
    ids=str,
)
def test_runs_where_it_can(overrides: dict, is_supported: bool, is_training: bool) -> None:
    router = make_router(make_config(**(LOSSES | overrides)), make_mask(random_visible_sets(0, 1, 10, 4)))
    router.train(is_training)
    names, launch = [], launching.launch

    def record_launch(kernel, *arguments, **constants) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    with kernels_on_cpu(), patch.object(launching, "launch", record_launch), torch.set_grad_enabled(is_training):
        probs, _ = router(torch.randn(3, 2, 8, device=DEVICE), TokenIds(torch.zeros(3, 2, dtype=torch.int64)))
        if is_training:
            probs.sum().backward()
    kernels = ["_route_kernel", "_route_backward_kernel"] if is_training else ["_route_kernel"]
    assert names == (kernels if is_supported else [])


def test_losses_of_tokens_that_other_ranks_route() -> None:
    """Planned dispatch attaches the losses before it sends the tokens."""
    results = []
    for uses_kernel in (False, True):
        router = make_router(
            make_config(6, 2, **(LOSSES | ALL_BALANCING_LOSSES)), make_mask(random_visible_sets(0, 1, 10, 6))
        )
        draw_parameters(router)
        hidden = torch.randn(7, 2, 8, device=DEVICE, requires_grad=True)
        ids = torch.randint(0, 10, (7, 2), device=DEVICE)
        take_metrics()
        with kernels_on_cpu() if uses_kernel else nullcontext():
            attached = router.attach_losses(hidden, TokenIds(ids))
            attached.sum().backward()
        assert torch.equal(attached, hidden.flatten(0, 1))
        results.append((hidden.grad, router.weight.grad, take_metrics()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "overrides", [{"moe_router_pre_softmax": True}, {"moe_router_score_function": "sigmoid"}, {}], ids=str
)
def test_layer_equals_layer_in_plain_torch(overrides: dict, dtype: torch.dtype) -> None:
    """Compare outputs and gradients; bfloat16 activations, whose router computes in float32."""
    settings = LOSSES | {"params_dtype": dtype, "bf16": dtype == torch.bfloat16} | overrides
    mask, results = make_mask(random_visible_sets(2, 1, 9, 6)), []
    for uses_kernel in (False, True):
        layer = make_layer(make_config(6, 3, **settings), mask).to(dtype)
        draw_parameters(layer)
        hidden = torch.randn(7, 2, 8, device=DEVICE, dtype=dtype, requires_grad=True)
        token_ids = torch.randint(0, 9, (2, 7), device=DEVICE)
        with kernels_on_cpu() if uses_kernel else nullcontext():
            output, _ = layer(hidden, padding_mask=token_ids)
            output.backward(torch.ones_like(output))
        results.append([output, hidden.grad, *(parameter.grad for parameter in layer.parameters())])
    # Weights that differ in the last bit of float32 can round to neighbours in bfloat16.
    relative = 1e-4 if dtype == torch.float32 else 2**-6
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=relative, atol=relative * expected.abs().max().item())
