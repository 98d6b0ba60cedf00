"""The router with raised logits of home experts, against the plain reference on logits that are raised by a loop."""

from contextlib import nullcontext
from math import exp

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support.kernels import kernels_on_cpu
from support.router_cases import ALL_BALANCING_LOSSES, LOSSES
from support.small_moe import (
    DEVICE,
    draw_parameters,
    make_config,
    make_mask,
    make_model,
    make_visible_experts,
    process_groups,
    random_visible_sets,
    reference_routing,
    take_metrics,
    with_homes,
)
from torch import Tensor

from maskmoe.conversion.model_tensors import routing_mask_tensors
from maskmoe.errors import UserError
from maskmoe.routing_mask import RoutingMask
from maskmoe.routing_mask.home_experts import home_of_ids
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.selection import raise_home_logits
from maskmoe.transformer.token_ids import TokenIds

VOCAB_SIZE, NUM_EXPERTS, SHAPE = 12, 6, (7, 3)
LOSS_SCALE = 0.5


@pytest.fixture(autouse=True)
def _loss_scale() -> None:
    """Set the scale of the auxiliary losses' gradients, as the pipeline schedule does for each micro-batch."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(LOSS_SCALE, device=DEVICE))


def mask_with_homes(sizes: tuple[int, ...] | None = None) -> RoutingMask:
    return with_homes(make_mask(random_visible_sets(3, 2, VOCAB_SIZE, NUM_EXPERTS, sizes)))


def build_router(mask: RoutingMask, home_logit: float, topk: int = 1, **settings: object) -> MaskMoERouter:
    config = make_config(NUM_EXPERTS, topk, num_layers=2, **(LOSSES | ALL_BALANCING_LOSSES | settings))
    visible_experts = make_visible_experts(config, mask, home_logit=home_logit)
    router = MaskMoERouter(config, process_groups(), visible_experts=visible_experts).to(DEVICE)
    router.set_layer_number(2)
    return router


def draw_batch() -> tuple[TokenIds, Tensor]:
    rng = np.random.default_rng(8)
    ids = torch.from_numpy(rng.integers(0, VOCAB_SIZE, SHAPE)).to(DEVICE)
    logits = torch.from_numpy(rng.normal(size=(*SHAPE, NUM_EXPERTS))).float().to(DEVICE)
    return TokenIds(ids), logits.requires_grad_()


@pytest.mark.parametrize("home_logit", [0.5, 6.0])
@pytest.mark.parametrize(
    ("topk", "settings"),
    [
        (1, {}),
        (2, {"moe_router_pre_softmax": True}),
        (2, {}),
        (3, {"moe_router_score_function": "sigmoid"}),
    ],
    ids=str,
)
def test_router_follows_the_reference_on_raised_logits(topk, settings, home_logit) -> None:
    """Weights, map, losses, and gradients with respect to the logits before they are raised."""
    mask = mask_with_homes()
    router, (token_ids, logits) = build_router(mask, home_logit, topk, **settings), draw_batch()
    take_metrics()
    probs, routing_map = router.routing(logits, token_ids)
    losses = {name: values[1] for name, values in take_metrics().items()}
    output_grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1)).to(probs)
    probs.backward(output_grad)

    exact = logits.detach().double().requires_grad_()
    visible = torch.from_numpy(mask.visible_sets(1)).to(DEVICE)[token_ids.ids.flatten()]
    raised = torch.zeros_like(exact).flatten(0, 1)
    for token, token_id in enumerate(token_ids.ids.flatten().tolist()):
        if visible[token].sum() > 1:
            raised[token, home_of_ids(mask, 1)[token_id]] = home_logit
    reference = reference_routing(
        exact.flatten(0, 1) + raised,
        visible,
        topk,
        score_function=settings.get("moe_router_score_function", "softmax"),
        pre_softmax=settings.get("moe_router_pre_softmax", topk == 1),
        num_sequences=SHAPE[1],
    )
    weighted = (
        2e-2 * reference.load_balancing_loss
        + 3e-2 * reference.seq_load_balancing_loss
        + 1e-2 * reference.load_balancing_loss
        + LOSSES["moe_z_loss_coeff"] * reference.z_loss
    )
    ((reference.probs * output_grad).sum() + LOSS_SCALE * weighted).backward()

    assert torch.equal(routing_map, reference.routing_map)
    tolerance = {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(probs, reference.probs, **tolerance)
    torch.testing.assert_close(losses["z_loss"], reference.z_loss, **tolerance)
    torch.testing.assert_close(losses["load_balancing_loss"], reference.load_balancing_loss, **tolerance)
    torch.testing.assert_close(logits.grad, exact.grad, **tolerance)


def test_zero_logits_choose_the_home_with_the_weight_of_the_definition() -> None:
    mask = mask_with_homes()
    router, (token_ids, logits) = build_router(mask, 5.0), draw_batch()
    probs, routing_map = router.routing(torch.zeros_like(logits), token_ids)
    for token, token_id in enumerate(token_ids.ids.flatten().tolist()):
        home, num_visible = home_of_ids(mask, 1)[token_id], mask.num_visible_of_layer(1)[token_id]
        assert routing_map[token].nonzero().tolist() == [[home]]
        torch.testing.assert_close(float(probs[token, home]), exp(5) / (exp(5) + num_visible - 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("topk", [1, 3])
def test_homes_without_a_home_logit_change_no_bit(topk) -> None:
    token_ids, logits = draw_batch()
    results = []
    plain = make_mask(random_visible_sets(3, 2, VOCAB_SIZE, NUM_EXPERTS))
    for mask in (plain, with_homes(plain)):
        router = build_router(mask, 0.0, topk)
        take_metrics()
        logits.grad = None
        probs, routing_map = router.routing(logits, token_ids)
        probs.square().sum().backward()
        results.append([probs, routing_map, logits.grad, *take_metrics().values()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("topk", [1, 3])
def test_kernel_sees_raised_logits(topk) -> None:
    token_ids, logits = draw_batch()
    results = []
    for context in (nullcontext, kernels_on_cpu):
        logits.grad = None
        take_metrics()
        with context():
            probs, routing_map = build_router(mask_with_homes(), 2.0, topk).routing(logits, token_ids)
            probs.square().sum().backward()
        results.append([probs, routing_map, logits.grad, *take_metrics().values()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)


def test_conversion_refuses_a_mask_with_homes() -> None:
    with pytest.raises(UserError, match="whose routing mask has home experts cannot be converted"):
        routing_mask_tensors(mask_with_homes())


def test_masks_without_homes_are_refused() -> None:
    mask = make_mask(random_visible_sets(3, 2, VOCAB_SIZE, NUM_EXPERTS))
    with pytest.raises(UserError, match="--home-expert-logit needs a routing mask with home experts: build"):
        build_router(mask, 1.0)


def test_raised_logits_of_no_tokens_are_empty() -> None:
    empty = torch.empty(0, 1, NUM_EXPERTS, device=DEVICE)
    assert raise_home_logits(empty, torch.empty(0, dtype=torch.int64, device=DEVICE), 1.0).shape == empty.shape


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_model_recomputes_the_same_choices(recompute) -> None:
    results = []
    for granularity in (None, recompute):
        settings = {"recompute_granularity": granularity}
        if granularity == "full":
            settings |= {"recompute_method": "uniform", "recompute_num_layers": 1}
        elif granularity:
            settings |= {"recompute_modules": ["moe"]}
        model = make_model(make_config(NUM_EXPERTS, 2, num_layers=2, **settings), mask_with_homes(), home_logit=3.0)
        results.append(loss_and_gradients(model))
    assert all(map(torch.equal, *results))
    plain = make_model(make_config(NUM_EXPERTS, 2, num_layers=2), mask_with_homes())
    assert not torch.equal(loss_and_gradients(plain)[0], results[0][0])


def loss_and_gradients(model: torch.nn.Module) -> list[Tensor]:
    draw_parameters(model)
    tokens = torch.randint(VOCAB_SIZE, (2, 8), device=DEVICE)
    loss = model(tokens, torch.arange(8, device=DEVICE).expand_as(tokens), None, labels=tokens)
    loss.mean().backward()
    return [loss, *(parameter.grad for parameter in model.parameters())]
