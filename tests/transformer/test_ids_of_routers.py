"""Every router gets the ids of exactly the tokens that it routes."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from support.hybrid_models import SEQUENCE, VOCAB_SIZE, Twins
from support.small_moe import DEVICE, make_mask, random_visible_sets, take_metrics
from torch import Tensor

from maskmoe.transformer.models import RoutesByTokenId
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing_statistics import RoutingSums
from maskmoe.transformer.token_ids import TokenIds, split_sequence

NUM_LAYERS, BATCH = 3, 2
VISIBLE = random_visible_sets(6, NUM_LAYERS + 1, VOCAB_SIZE, 4)
MASK = make_mask(VISIBLE)
MODELS = {"GPT": Twins.gpt, "hybrid": Twins.hybrid}
every_model = pytest.mark.parametrize("kind", MODELS)
RECOMPUTE = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full_in_blocks": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}

WRONG_IDS = "a router got the ids of another micro-batch"


@dataclass(frozen=True)
class RouterCall:
    """One call of a router.

    Attributes:
        layer_number: the router's layer, counting from 1.
        token_ids: the ids [sequence, batch] that the router was given.
        routing_map: bool [tokens, experts], the router's choice.
    """

    layer_number: int
    token_ids: TokenIds
    routing_map: Tensor


@pytest.fixture
def router_calls(monkeypatch: pytest.MonkeyPatch) -> list[RouterCall]:
    """Record the calls of all routers in order."""
    calls = []
    route = MaskMoERouter.forward

    def record(self, input, token_ids):
        probs, routing_map = route(self, input, token_ids)
        calls.append(RouterCall(self.layer_number, token_ids, routing_map))
        return probs, routing_map

    monkeypatch.setattr(MaskMoERouter, "forward", record)
    return calls


def build_model(kind: str, recompute: str = "none", predictions: str = "", **stage: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    mask = MASK if predictions else make_mask(VISIBLE[:NUM_LAYERS])
    return MODELS[kind](Twins(f"*E*E*E{predictions}", RECOMPUTE[recompute], mask=mask), **stage)


def micro_batches(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, VOCAB_SIZE, (number, BATCH, SEQUENCE), generator=generator).to(DEVICE))


def forward(model: torch.nn.Module, token_ids: Tensor, **side_tensors: Tensor) -> Tensor:
    take_metrics()
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(BATCH, -1)
    return model(token_ids, positions, None, labels=token_ids.roll(-1, dims=1), **side_tensors)


def check_two_micro_batches_in_flight(model: torch.nn.Module, calls: list[RouterCall]) -> None:
    """Run both forward passes before the first backward pass, as the first stage of a pipeline does."""
    batches = micro_batches(2)
    losses, calls_of_batch = [], []
    for token_ids in batches:
        losses.append(forward(model, token_ids).mean())
        calls_of_batch.append(calls.copy())
        calls.clear()
    for loss, made_forward in zip(losses, calls_of_batch, strict=True):
        loss.backward()
        made_forward += calls
        calls.clear()
    for token_ids, made in zip(batches, calls_of_batch, strict=True):
        assert {call.layer_number for call in made} == set(range(1, NUM_LAYERS + 1))
        assert all(torch.equal(call.token_ids.ids, token_ids.T) for call in made), WRONG_IDS
        for call in made:
            visible = torch.from_numpy(MASK.visible_sets(call.layer_number - 1)).to(DEVICE)[token_ids.T.flatten()]
            assert not (call.routing_map & ~visible).any()
            (first, *again) = [other.routing_map for other in made if other.layer_number == call.layer_number]
            assert all(torch.equal(first, other) for other in again)


def check_equals_plain_model(model: torch.nn.Module, kind: str, calls: list[RouterCall]) -> None:
    """Compare gradients and statistics after two micro-batches, bit for bit, with a model of no further settings."""
    plain = build_model(kind)
    for each in (model, plain):
        check_two_micro_batches_in_flight(each, calls)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    ours, theirs = (
        [router.statistics.take() for router in each.modules() if isinstance(router, MaskMoERouter)]
        for each in (model, plain)
    )
    assert len(ours) == NUM_LAYERS
    for (sums, most_rows), (plain_sums, plain_most_rows) in zip(ours, theirs, strict=True):
        assert RoutingSums.unpack(sums).num_tokens == 2 * BATCH * SEQUENCE
        assert torch.equal(sums, plain_sums)
        assert most_rows == plain_most_rows > 0


@every_model
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_two_micro_batches_in_flight(recompute: str, kind: str, router_calls: list[RouterCall]) -> None:
    check_equals_plain_model(build_model(kind, recompute), kind, router_calls)


@every_model
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_ids_kept_on_a_module_are_caught(
    recompute: str, kind: str, router_calls: list[RouterCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check fails for routers that read the ids of the latest forward pass (negative control)."""
    model = build_model(kind, recompute)
    ids_of_layers, route = RoutesByTokenId.ids_of_layers, MaskMoERouter.forward

    def keep_ids(self, input_ids, *args, **kwargs):
        MaskMoERouter.current_ids = TokenIds(input_ids.T)
        return ids_of_layers(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(MaskMoERouter, "current_ids", None, raising=False)
    monkeypatch.setattr(RoutesByTokenId, "ids_of_layers", keep_ids)
    monkeypatch.setattr(MaskMoERouter, "forward", lambda self, input, token_ids: route(self, input, self.current_ids))
    with pytest.raises(AssertionError, match=WRONG_IDS):
        check_two_micro_batches_in_flight(model, router_calls)


@every_model
def test_later_pipeline_stage_routes_by_ids(kind: str, router_calls: list[RouterCall]) -> None:
    stage = build_model(kind, pre_process=False, post_process=False)
    (token_ids,) = micro_batches(1)
    take_metrics()
    stage.set_input_tensor(torch.randn(SEQUENCE, BATCH, 16, device=DEVICE))
    assert stage(token_ids, None, None).shape == (SEQUENCE, BATCH, 16)
    assert len(router_calls) == NUM_LAYERS
    assert all(torch.equal(call.token_ids.ids, token_ids.T) for call in router_calls)


@every_model
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_multi_token_prediction_routes_by_the_ids_it_embeds(
    recompute: str, kind: str, router_calls: list[RouterCall]
) -> None:
    model = build_model(kind, recompute, "/*E")
    (token_ids,) = micro_batches(1)
    forward(model, token_ids).mean().backward()
    mtp_router = next(m for name, m in model.named_modules() if isinstance(m, MaskMoERouter) and "mtp" in name)
    next_ids = torch.cat([token_ids[:, 1:], token_ids.new_zeros(BATCH, 1)], dim=1)
    visible = torch.from_numpy(MASK.visible_sets(NUM_LAYERS)).to(DEVICE)[next_ids.T.flatten()]
    calls = [call for call in router_calls if not torch.equal(call.token_ids.ids, token_ids.T)]
    # Megatron-Core recomputes a hybrid layer of multi-token prediction as a whole, then the layers inside of it.
    assert len(calls) == {"none": 1, "full": 2 if kind == "GPT" else 3}[recompute]
    for call in calls:
        assert call.layer_number == mtp_router.layer_number
        assert torch.equal(call.token_ids.ids, next_ids.T)
        assert torch.equal(call.routing_map.sum(dim=1), visible.sum(dim=1).clamp(max=2))
        assert not (call.routing_map & ~visible).any()


def test_sequence_parallel_ranks_take_their_part_of_the_ids() -> None:
    token_ids = torch.arange(24).view(2, 12)
    groups = [SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 3) for rank in range(3)]
    parts = [split_sequence(token_ids, group) for group in groups]
    # Hidden states [sequence, batch, hidden] are split along the sequence.
    for part, expected in zip(parts, token_ids.T.chunk(3), strict=True):
        assert torch.equal(part.T, expected)


@every_model
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_padding_reaches_every_router(recompute: str, kind: str, router_calls: list[RouterCall]) -> None:
    """Padding changes the losses of the routers, but not the routing."""
    model = build_model(kind, recompute)
    (token_ids,) = micro_batches(1)
    forward(model, token_ids).mean().backward()
    plain_calls, plain_losses = router_calls.copy(), take_metrics()
    router_calls.clear()
    is_padding = torch.rand(BATCH, SEQUENCE, device=DEVICE) < 0.3
    forward(model, token_ids, padding_mask=is_padding).mean().backward()
    losses = take_metrics()
    for call, plain in zip(router_calls, plain_calls, strict=True):
        assert torch.equal(call.token_ids.ids, token_ids.T)
        assert torch.equal(call.token_ids.is_padding, is_padding.T)
        assert torch.equal(call.routing_map, plain.routing_map)
    for name in ("load_balancing_loss", "z_loss"):
        assert (losses[name][:NUM_LAYERS] != plain_losses[name][:NUM_LAYERS]).all()
