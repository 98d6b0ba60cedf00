"""Recorded choices are replayed as Megatron-Core's router replays them, if the routing mask allows them."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from support.router_cases import Case, cases
from support.small_moe import DEVICE, make_config, make_mask, make_router, process_groups, take_metrics
from support.tensors import assert_same_tensors
from torch import Tensor

from maskmoe.transformer.token_ids import TokenIds

NUM_EXPERTS = 6
TOPK = 3
SHAPE = (5, 2)
SELECTIONS = {
    "softmax": {},
    "softmax first": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 3,
        "moe_router_group_topk": 3,
    },
}
# Visible sets of the ids 0, 1 and 2. The last id sees fewer experts than k.
VISIBLE = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 1, 0]], bool)[None]


@pytest.fixture(autouse=True)
def _no_other_routers() -> Iterator[None]:
    """Forget the routers and losses of other tests, because Megatron-Core keeps them for the whole process."""
    RouterReplay.clear_global_router_replay_instances()
    take_metrics()
    yield
    RouterReplay.clear_global_router_replay_instances()
    take_metrics()


def replay_config(**settings):
    return make_config(NUM_EXPERTS, TOPK, moe_enable_routing_replay=True, **settings)


def masked_router():
    router = make_router(replay_config(), make_mask(VISIBLE), layer_number=1)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    return router


def route(router, hidden: Tensor, *token_ids: TokenIds) -> dict[str, Tensor]:
    """Return the outputs and gradients of a router."""
    hidden = hidden.clone().requires_grad_()
    router.weight.grad = None
    probs, routing_map = router(hidden, *token_ids)
    probs.backward(torch.linspace(-1, 1, probs.numel()).view_as(probs).to(probs))
    return {"probs": probs.detach(), "map": routing_map, "input": hidden.grad, "weight": router.weight.grad}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_visible_equals_stock(selection: str) -> None:
    config = replay_config(moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3, **SELECTIONS[selection])
    ours = make_router(config, make_mask(np.ones((1, 4, NUM_EXPERTS), bool)))
    stock = TopKRouter(config, process_groups()).to(DEVICE)
    stock.set_layer_number(1)
    stock.load_state_dict({name: ours.state_dict()[name] for name in stock.state_dict()})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, *SHAPE, config.hidden_size, generator=generator).to(DEVICE)
    token_ids = TokenIds(torch.randint(0, 4, SHAPE, generator=generator).to(DEVICE))

    def check(micro_batch: int) -> None:
        assert_same_tensors(route(ours, hidden[micro_batch], token_ids), route(stock, hidden[micro_batch]))

    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    check(0)
    recorded, stock_recorded = RouterReplay.get_recorded_data()
    assert torch.equal(recorded, stock_recorded)

    # Other choices than the routers would make, of two micro-batches.
    choices = [torch.rand(10, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :TOPK] for _ in range(2)]
    for micro_batch, choice in enumerate(choices):
        RouterReplay.set_replay_data([choice, choice])
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        check(micro_batch)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    for micro_batch in range(2):
        check(micro_batch)
    RouterReplay.clear_global_router_replay_action()
    check(0)


@given(case=cases())
def test_replay_of_a_record_changes_nothing(case: Case) -> None:
    no_losses = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    router = case.router(moe_enable_routing_replay=True, **no_losses)

    def routed() -> tuple[Tensor, Tensor, Tensor]:
        logits = case.logits(scale=2)
        probs, routing_map = router.routing(logits, case.token_ids)
        probs.square().sum().backward()
        return probs.detach(), routing_map, logits.grad

    plain = routed()
    router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)
    recording = routed()
    recorded = router.router_replay.get_recorded_indices()
    assert case.visible.gather(1, recorded).all()
    # Sets, because repetitions fill up to k.
    assert [set(row) for row in recorded.tolist()] == [set(row.nonzero().flatten().tolist()) for row in plain[1]]
    router.router_replay.set_target_indices(recorded.to(torch.int32))
    router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    for ours, again, replayed in zip(plain, recording, routed(), strict=True):
        assert torch.equal(ours, again)
        assert torch.equal(ours, replayed)


@pytest.mark.parametrize("choice", [[1, 0, 2], [1, 2, 6], [1, 2, -1], [4, 1, 4]], ids=str)
def test_choice_that_the_mask_does_not_allow_is_refused(choice: list[int]) -> None:
    router = masked_router()
    token_ids = torch.zeros(SHAPE, dtype=torch.int64, device=DEVICE)
    token_ids[3, 1] = 1
    choices = torch.arange(TOPK).repeat(10, 1)
    choices[3 * SHAPE[1] + 1] = torch.tensor(choice)
    router.router_replay.set_target_indices(choices)
    router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    with pytest.raises(ValueError, match=r"layer 1 cannot replay .*token with id 1 at position 3 of sequence 1"):
        router(torch.randn(*SHAPE, 8, device=DEVICE), TokenIds(token_ids))


@pytest.mark.parametrize("choice", [None, torch.zeros(10, 2, dtype=torch.int64), torch.zeros(9, 3, dtype=torch.int64)])
def test_choice_of_other_tokens_is_refused(choice: Tensor | None) -> None:
    router = masked_router()
    router.router_replay.target_topk_idx = choice
    token_ids = TokenIds(torch.zeros(SHAPE, dtype=torch.int64, device=DEVICE))
    for action in (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD):
        router.router_replay.set_router_replay_action(action)
        with pytest.raises(ValueError, match="layer 1 cannot replay"):
            router(torch.randn(*SHAPE, 8, device=DEVICE), token_ids)
