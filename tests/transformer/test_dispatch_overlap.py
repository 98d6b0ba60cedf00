"""A layer computes while its tokens travel: the order of its work on two real ranks, and the bits of late rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support import small_moe as moe
from support.launchers import RunRanks
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE = 6, 8


@dataclass
class Trace:
    """Records what a layer does, in order: all-to-alls that start and are waited for, router and shared experts."""

    events: list[str] = field(default_factory=list)

    def follow(self, name: str, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function that also records when it runs, and when its backward pass begins."""

        def followed(hidden: Tensor) -> Tensor:
            output = compute(hidden)
            self.events.append(name)
            output.register_hook(lambda _: self.events.append(f"{name}-backward"))
            return output

        return followed

    def all_to_all(self, output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        """Replace torch's function; the received rows are NaN until they are waited for."""
        received = torch.empty_like(output)
        ALL_TO_ALL(received, input, *args, **kwargs)
        if not async_op:
            return output.copy_(received)
        self.events.append("start")
        output.fill_(torch.nan)
        return SimpleNamespace(wait=lambda: (self.events.append("wait"), output.copy_(received)))


ALL_TO_ALL = torch.distributed.all_to_all_single


def build_layer(kind: DispatchKind) -> MaskMoELayer:
    config = moe.make_config(
        NUM_EXPERTS,
        2,
        expert_model_parallel_size=2,
        moe_shared_expert_intermediate_size=10,
        moe_aux_loss_coeff=1e-2,
        moe_z_loss_coeff=1e-3,
    )
    layer = moe.make_layer(config, moe.make_mask(moe.visible_halves(VOCAB_SIZE, NUM_EXPERTS)))
    moe.draw_parameters(layer)
    layer.dispatcher = build_dispatcher(kind, layer, moe.process_groups())
    return layer


def run_layer(layer: MaskMoELayer) -> dict[str, Tensor]:
    """Return the output and all gradients."""
    draws = torch.Generator().manual_seed(torch.distributed.get_rank())
    hidden, gradient = torch.randn(2, 7, 2, 8, generator=draws).to(DEVICE)
    hidden.requires_grad_()
    token_ids = TokenIds(torch.randint(0, VOCAB_SIZE, (2, 7), generator=draws).to(DEVICE))
    layer.zero_grad()
    output, _ = layer(hidden, padding_mask=pack_token_ids(moe.plan_ids(layer, token_ids)))
    output.backward(gradient)
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, **gradients}


def results_of_rank() -> dict[str, tuple[list[str], list[str]]]:
    """Return, for each kind of dispatch, the trace, and what differs if the rows arrive as late as possible."""
    moe.initialize_parallelism(expert_model_parallel_size=2)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0, device=DEVICE))
    results = {}
    for kind in (DispatchKind.PLANNED, DispatchKind.ONE_COPY):
        early = run_layer(build_layer(kind))

        layer, trace = build_layer(kind), Trace()
        layer.router.gating = trace.follow("router", layer.router.gating)
        layer.shared_experts.forward = trace.follow("shared", layer.shared_experts.forward)
        torch.distributed.all_to_all_single = trace.all_to_all
        late = run_layer(layer)
        torch.distributed.all_to_all_single = ALL_TO_ALL
        results[kind.name] = trace.events, [name for name, value in early.items() if not torch.equal(value, late[name])]
    return results


@pytest.fixture(scope="module")
def two_ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(results_of_rank, tmp_path_factory.mktemp("ranks"))


# The order of events, forward | backward. Dispatch and combine each start an all-to-all and wait for it.
EVENTS = {
    "PLANNED": "start router shared wait router start wait | "
    "start wait router-backward start shared-backward router-backward wait",
    "ONE_COPY": "router start shared wait start wait | start wait start shared-backward wait router-backward",
}


@pytest.mark.parametrize("kind", EVENTS)
def test_losses_and_shared_experts_run_while_rows_travel(kind: str, two_ranks: list[dict]) -> None:
    """With a plan, the router also runs after the rows have arrived, because it chooses experts there."""
    for rank in two_ranks:
        assert rank[kind][0] == EVENTS[kind].replace("| ", "").split()


@pytest.mark.parametrize("kind", EVENTS)
def test_late_rows_change_no_bit(kind: str, two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        assert rank[kind][1] == []
