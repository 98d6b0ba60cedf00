"""Visible experts whose number grows: only home experts in the first iterations, then the visible sets of the mask."""

import pytest
import torch
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
    take_metrics,
    with_homes,
)
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.routing_mask.home_experts import home_of_ids
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

VOCAB_SIZE, NUM_EXPERTS, WARMUP = 12, 6, 3
MASK = with_homes(make_mask(random_visible_sets(3, 2, VOCAB_SIZE, NUM_EXPERTS)))
SEVERAL = with_homes(make_mask(random_visible_sets(3, 2, VOCAB_SIZE, NUM_EXPERTS, sizes=(3, 5))))


def build_router(mask, topk: int, warmup_iters: int, iteration: int | None, home_logit: float = 0.0) -> MaskMoERouter:
    config = make_config(NUM_EXPERTS, topk, num_layers=2, **(LOSSES | ALL_BALANCING_LOSSES))
    visible_experts = make_visible_experts(config, mask, warmup_iters=warmup_iters, home_logit=home_logit)
    visible_experts.iteration = iteration
    router = MaskMoERouter(config, process_groups(), visible_experts=visible_experts).to(DEVICE)
    router.set_layer_number(2)
    return router


def route(router: MaskMoERouter) -> list[Tensor]:
    """Return weights, map, gradients with respect to the logits, and losses."""
    generator = torch.Generator().manual_seed(2)
    token_ids = TokenIds(torch.arange(VOCAB_SIZE, device=DEVICE).view(-1, 2))
    logits = torch.randn(VOCAB_SIZE // 2, 2, NUM_EXPERTS, generator=generator).to(DEVICE).requires_grad_()
    take_metrics()
    probs, routing_map = router.routing(logits, token_ids)
    probs.backward(torch.randn(probs.shape, generator=generator).to(probs))
    assert logits.grad is not None
    return [probs.detach(), routing_map, logits.grad, *take_metrics().values()]


@pytest.mark.parametrize("home_logit", [0.0, 4.0])
@pytest.mark.parametrize("mask", [MASK, SEVERAL], ids=["some", "all"])
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("iteration", [0, WARMUP - 1])
def test_warm_up_is_a_table_lookup_of_homes(iteration, topk, mask, home_logit) -> None:
    probs, routing_map, grad, *_ = route(build_router(mask, topk, WARMUP, iteration, home_logit))
    homes = torch.from_numpy(home_of_ids(mask, 1)).long().to(DEVICE)
    expected = torch.nn.functional.one_hot(homes, NUM_EXPERTS)
    assert torch.equal(probs, expected.float())
    assert torch.equal(routing_map, expected.bool())
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("home_logit", [0.0, 4.0])
@pytest.mark.parametrize("mask", [MASK, SEVERAL], ids=["some", "all"])
@pytest.mark.parametrize("topk", [1, 2])
def test_after_the_warm_up_no_bit_differs_from_a_run_without(topk, mask, home_logit) -> None:
    expected = route(build_router(mask, topk, 0, None, home_logit))
    for iteration in (WARMUP, 1000):
        assert all(map(torch.equal, route(build_router(mask, topk, WARMUP, iteration, home_logit)), expected))
    assert not torch.equal(route(build_router(mask, topk, WARMUP, 0, home_logit))[0], expected[0])


@pytest.mark.parametrize("iteration", [0, WARMUP])
def test_kernel_sees_the_experts_of_the_iteration(iteration) -> None:
    expected = route(build_router(MASK, 2, WARMUP, iteration))
    with kernels_on_cpu():
        found = route(build_router(MASK, 2, WARMUP, iteration))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_iteration_must_be_known() -> None:
    with pytest.raises(RuntimeError, match="nothing has set the iteration"):
        route(build_router(MASK, 1, WARMUP, None))


def test_masks_without_homes_are_refused() -> None:
    mask = make_mask(random_visible_sets(3, 2, VOCAB_SIZE, NUM_EXPERTS))
    with pytest.raises(UserError, match="--visible-experts-warmup-iters needs a routing mask with home experts: build"):
        build_router(mask, 1, WARMUP, 0)


def test_dispatchers_and_plans_see_one_expert() -> None:
    """A dispatcher must not count on several visible experts, and a plan counts the rows that the router selects."""
    ids = torch.arange(VOCAB_SIZE, device=DEVICE).view(1, -1)
    mask = with_homes(make_mask(rank_local_sets()))
    config = make_config(NUM_EXPERTS, 2, expert_model_parallel_size=2)
    visible_experts = make_visible_experts(config, mask, warmup_iters=WARMUP)
    assert visible_experts.min_visible == 1
    for iteration in (0, WARMUP):
        visible_experts.iteration = iteration
        rank, number = visible_experts.rank_and_size(ids, torch.zeros(1, dtype=torch.long, device=DEVICE))
        sets = visible_experts(ids.flatten(), 0).experts  # [tokens, experts]
        assert torch.equal(number.flatten(), sets.sum(dim=1))
        assert torch.equal(rank.flatten(), sets.long().argmax(dim=1) // (NUM_EXPERTS // 2))
        assert int(number.max()) == (1 if iteration < WARMUP else 3)


def rank_local_sets():
    sets = random_visible_sets(4, 1, VOCAB_SIZE, NUM_EXPERTS, sizes=(6,))
    sets[:, : VOCAB_SIZE // 2, : NUM_EXPERTS // 2] = False
    sets[:, VOCAB_SIZE // 2 :, NUM_EXPERTS // 2 :] = False
    return sets


@pytest.mark.parametrize("iteration", [0, WARMUP])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_model_recomputes_the_same_choices(recompute, iteration) -> None:
    results = []
    settings = {
        "full": {"recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {"recompute_modules": ["moe"]},
        None: {},
    }
    for granularity in (None, recompute):
        config = make_config(NUM_EXPERTS, 2, num_layers=2, recompute_granularity=granularity, **settings[granularity])
        model = make_model(config, MASK, warmup_iters=WARMUP)
        model.routing_mask.iteration = iteration
        draw_parameters(model)
        tokens = torch.randint(VOCAB_SIZE, (2, 8), device=DEVICE)
        loss = model(tokens, torch.arange(8, device=DEVICE).expand_as(tokens), None, labels=tokens)
        loss.mean().backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *results))
