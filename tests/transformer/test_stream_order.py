"""The order of asynchronous all-to-alls, checked by torch's CUDA sanitizer on a trace of a CPU run.

The sanitizer reports a kernel that touches memory which another stream has written, or still reads, unless an event
orders the two. Each all-to-all runs on its own stream, so that no wait for one all-to-all stands in for another.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from unittest.mock import patch

import pytest
import torch
from routed_tokens import let_one_rank_plan
from support.small_moe import DEVICE, make_config, make_layer, make_mask, plan_ids, process_groups, random_visible_sets
from torch import Tensor
from torch.cuda._sanitizer import ArgumentHandler, EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.all_to_all import _AllToAll
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

MAIN = 0


class Trace(TorchDispatchMode):
    """Reports the operations of a `with` block, and the order of their streams, to torch's CUDA sanitizer.

    Attributes:
        races: The operations that the sanitizer reports.
        num_all_to_alls: The number of started all-to-alls, and of the stream of the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []
        self.num_all_to_alls = 0
        self._handler = EventHandler()
        self._events = count()
        self._stream = MAIN
        self._kept: list[Any] = []  # No memory is used twice.

    def order(self, earlier: int, later: int) -> None:
        """Let a stream wait for the work that another stream has been given."""
        event = next(self._events)
        self._handler._handle_event_record(event, earlier)
        self._handler._handle_event_wait(event, later)

    @contextmanager
    def on_new_stream(self) -> Iterator[int]:
        """Run operations on a stream of their own, after those of the main stream; return the stream."""
        self.num_all_to_alls += 1
        self._stream = self.num_all_to_alls
        self.order(MAIN, self._stream)
        yield self._stream
        self._stream = MAIN

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self._kept.append(outputs)
        if func.namespace == "aten":
            accessed = ArgumentHandler()
            with patch.object(Tensor, "is_cuda", True):  # the sanitizer ignores tensors on the host
                accessed.parse_inputs(func._schema, args, kwargs or {}, is_factory=False)
                accessed.parse_outputs(func._schema, outputs, is_factory=False)
            reads, writes = accessed.dataptrs_read - accessed.dataptrs_written, accessed.dataptrs_written
            aliases = defaultdict[int, list[str]](list)
            if self._handler._handle_kernel_launch(self._stream, reads, writes, set(), str(func), aliases):
                self.races.append(str(func))
        return outputs


@dataclass(frozen=True)
class Work:
    """The handle of an all-to-all."""

    trace: Trace
    stream: int

    def wait(self) -> None:
        """Let the main stream wait for the all-to-all."""
        self.trace.order(self.stream, MAIN)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Return a trace on which the all-to-alls of one rank are asynchronous."""
    trace = Trace()

    def start(self: _AllToAll, sending: Tensor, rows_from: tuple[int, ...], *_unused: Any) -> None:
        self.received = sending.new_empty(sum(rows_from), *sending.shape[1:])
        self._sending = sending
        with trace.on_new_stream() as stream:
            self.received.copy_(sending)
        self._work = Work(trace, stream)

    monkeypatch.setattr(_AllToAll, "__init__", start)
    return trace


def run_layer(kind: DispatchKind, trace: Trace) -> None:
    """Run the forward and backward pass of an MoE layer with shared experts and losses."""
    config = make_config(
        ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=16,
        moe_shared_expert_gate=True,
        moe_z_loss_coeff=1e-3,
        moe_aux_loss_coeff=1e-2,
    )
    mask = make_mask(random_visible_sets(0, 1, 30, 4, (2, 3)))
    layer = make_layer(config, mask)
    layer.dispatcher = build_dispatcher(kind, layer, process_groups())
    token_ids = TokenIds(torch.randint(0, 30, (1, 12), device=DEVICE))
    if kind is DispatchKind.PLANNED:
        let_one_rank_plan(layer.router.visible_experts, mask)
        token_ids = plan_ids(layer, token_ids)
    hidden = torch.randn(12, 1, config.hidden_size, device=DEVICE, requires_grad=True)
    with trace:
        output, _ = layer(hidden.clone(), padding_mask=pack_token_ids(token_ids))
        output.backward(torch.ones_like(output))
        assert hidden.grad is not None
        hidden.grad.clone()


KINDS = pytest.mark.parametrize("kind", [DispatchKind.PLANNED, DispatchKind.ONE_COPY])


@KINDS
def test_all_to_alls_are_ordered(kind: DispatchKind, trace: Trace) -> None:
    """Rows and weights travel, and their gradients travel back."""
    run_layer(kind, trace)
    assert trace.races == []
    assert trace.num_all_to_alls == 4


@KINDS
@pytest.mark.parametrize("omitted", range(4))
def test_omitted_wait_is_found(kind: DispatchKind, omitted: int, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    number = count()
    wait = Work.wait
    monkeypatch.setattr(Work, "wait", lambda work: None if next(number) == omitted else wait(work))
    run_layer(kind, trace)
    assert trace.races
