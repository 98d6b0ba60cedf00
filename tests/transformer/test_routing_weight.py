"""The weights of selected experts, against a few lines of plain torch on the reference's probabilities."""

import pytest
import torch
from support.kernels import kernels_on_cpu
from support.router_cases import ALL_BALANCING_LOSSES, LOSSES
from support.small_moe import (
    DEVICE,
    make_config,
    make_mask,
    make_router,
    random_visible_sets,
    reference_routing,
    take_metrics,
)
from torch import Tensor

from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

VOCAB_SIZE, NUM_EXPERTS = 14, 6
MASK = make_mask(random_visible_sets(3, 1, VOCAB_SIZE, NUM_EXPERTS))
VISIBLE = torch.from_numpy(MASK.visible_sets(0)).to(DEVICE)  # [tokens, experts]: each id occurs once
TOKEN_IDS = TokenIds(torch.arange(VOCAB_SIZE, device=DEVICE).view(-1, 2))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def build_router(topk: int, **settings: object) -> MaskMoERouter:
    return make_router(make_config(NUM_EXPERTS, topk, moe_router_pre_softmax=True), MASK, **settings)


def route(router: MaskMoERouter) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, map, and the gradient [tokens, experts] with respect to the logits."""
    logits = draw(VOCAB_SIZE // 2, 2, NUM_EXPERTS).requires_grad_()
    probs, routing_map = router.routing(logits, TOKEN_IDS)
    probs.backward(draw(VOCAB_SIZE, NUM_EXPERTS))
    assert logits.grad is not None
    return probs.detach(), routing_map, logits.grad.flatten(0, 1)


@pytest.mark.parametrize("kind", ["scaled", "one"])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_weights_and_gradients_follow_the_definition(topk, kind) -> None:
    probs, routing_map, grad = route(build_router(topk, routing_weight=kind))
    exact = draw(VOCAB_SIZE // 2, 2, NUM_EXPERTS).double().requires_grad_()
    reference = reference_routing(exact.flatten(0, 1), VISIBLE, topk, pre_softmax=True)
    weights = []
    for token in range(VOCAB_SIZE):
        num_visible = int(VISIBLE[token].sum())
        if kind == "scaled":
            weights.append(reference.probs[token] * num_visible / min(topk, num_visible))
        else:
            weights.append(reference.probs[token] / float(reference.probs[token].detach().sum()))
    expected = torch.stack(weights)
    expected.backward(draw(VOCAB_SIZE, NUM_EXPERTS).double())
    assert torch.equal(routing_map, reference.routing_map)
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(probs, expected, **tolerance)
    torch.testing.assert_close(grad, exact.grad.flatten(0, 1), **tolerance)
    # Tokens with one visible expert.
    is_single = VISIBLE.sum(dim=1) == 1
    assert is_single.any()
    assert torch.equal(probs[is_single], VISIBLE[is_single].float())
    assert torch.equal(grad[is_single], torch.zeros_like(grad[is_single]))


@pytest.mark.parametrize("kind", ["scaled", "one"])
@pytest.mark.parametrize("topk", [1, 2])
def test_probabilities_of_the_kernel_are_weighed_alike(topk, kind) -> None:
    expected = route(build_router(topk, routing_weight=kind))
    with kernels_on_cpu():
        found = route(build_router(topk, routing_weight=kind))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_one_expert_has_weight_exactly_1() -> None:
    probs, routing_map, grad = route(build_router(1, routing_weight="one"))
    assert torch.equal(probs, routing_map.float())
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize("topk", [1, 2])
def test_undecided_router_starts_with_weights_of_sum_1(topk) -> None:
    router = build_router(topk, routing_weight="scaled")
    probs, _ = router.routing(torch.zeros(VOCAB_SIZE // 2, 2, NUM_EXPERTS, device=DEVICE), TOKEN_IDS)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(VOCAB_SIZE, device=DEVICE))


@pytest.mark.parametrize("topk", [1, 2])
def test_default_is_the_probability_bit_for_bit(topk) -> None:
    assert all(map(torch.equal, route(build_router(topk)), route(build_router(topk, routing_weight="probability"))))
    exact = draw(VOCAB_SIZE // 2, 2, NUM_EXPERTS).masked_fill(~VISIBLE.view(-1, 2, NUM_EXPERTS), float("-inf"))
    probs, routing_map, _ = route(build_router(topk))
    assert torch.equal(probs, exact.flatten(0, 1).softmax(dim=1) * routing_map)


@pytest.mark.parametrize("kind", ["scaled", "one"])
def test_losses_do_not_depend_on_the_weight(kind) -> None:
    found = []
    for routing_weight in ("probability", kind):
        config = make_config(NUM_EXPERTS, 1, **(LOSSES | ALL_BALANCING_LOSSES))
        router = make_router(config, MASK, routing_weight=routing_weight)
        take_metrics()
        router.routing(draw(VOCAB_SIZE // 2, 2, NUM_EXPERTS).requires_grad_(), TOKEN_IDS)
        found.append(list(take_metrics().values()))
    assert len(found[0]) >= 4
    assert all(map(torch.equal, *found))
