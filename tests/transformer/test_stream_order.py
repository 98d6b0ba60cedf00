"""Orders between streams, checked by torch's CUDA sanitizer on a trace of a CPU run in the branches of GPUs.

The sanitizer reports a kernel that touches memory which another stream has written, or still reads, unless an event
orders the two. Parameters are gathered on streams of their own, and overlapped shared experts run on a stream. The
trace holds the forward pass: autograd changes streams in the backward pass only on a GPU.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from routed_tokens import let_one_rank_plan
from support.hybrid_models import make_gated_delta_net
from support.places import take_gpu_branches
from support.small_moe import DEVICE, make_config, make_layer, make_mask, plan_ids, process_groups, random_visible_sets
from torch import Tensor
from torch.cuda._sanitizer import ArgumentHandler, EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer import experts, router
from maskmoe.transformer.dispatch import stock
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.gathered_parameters import wait_for_convolutions
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids


class Stream:
    """A stream of the trace, in the place of `torch.cuda.Stream`."""

    def __init__(self, trace: "Trace") -> None:
        self._trace = trace
        self.number = next(trace.numbers)

    def wait_stream(self, other: "Stream") -> None:
        self._trace.order(other, self)

    def record_event(self) -> SimpleNamespace:
        """Return an event that the host can wait for."""
        handler, event = self._trace.handler, next(self._trace.numbers)
        handler._handle_event_record(event, self.number)
        return SimpleNamespace(synchronize=lambda: handler._handle_event_synchronization(event))


class Trace(TorchDispatchMode):
    """Hands the operations of a `with` block and the orders of their streams to torch's CUDA sanitizer.

    Attributes:
        numbers: numbers of streams and events.
        main: the stream of the host's work.
        current: the stream of the next operation.
        handler: the sanitizer.
        races: the operations that the sanitizer reports.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count()
        self.main = self.current = Stream(self)
        self.races: list[str] = []
        self.handler = EventHandler()
        self._kept: list[Any] = []  # No memory is used twice.

    def order(self, earlier: Stream, later: Stream) -> None:
        """Let a stream wait for what another stream has to do now."""
        event = next(self.numbers)
        self.handler._handle_event_record(event, earlier.number)
        self.handler._handle_event_wait(event, later.number)

    def launch(self, stream: Stream, reads: set[int], writes: set[int], name: str) -> None:
        """Let a stream read and write memory, given by addresses."""
        aliases = defaultdict[int, list[str]](list)
        if self.handler._handle_kernel_launch(stream.number, reads, writes, set(), name, aliases):
            self.races.append(name)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Launch on a stream, as `torch.cuda.stream` does."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self._kept.append(outputs)
        if func.namespace == "aten":
            accessed = ArgumentHandler()
            accessed.parse_inputs(func._schema, args, kwargs or {}, is_factory=False)
            accessed.parse_outputs(func._schema, outputs, is_factory=False)
            writes = accessed.dataptrs_written
            self.launch(self.current, accessed.dataptrs_read - writes, writes, str(func))
        return outputs

    def gather(self, gather: Callable[..., None], group: Any, **options: Any) -> None:
        """Gather the parameters of a bucket group on a stream of its own, until the group waits."""
        gather(group, **options)
        stream, handle = Stream(self), group.param_gather_handle
        self.order(self.current, stream)
        parameters = {parameter.data_ptr() for bucket in group.buckets for parameter in bucket.params_list}
        self.launch(stream, set(), parameters, "gather")
        wait = handle.wait
        handle.wait = lambda: (wait(), self.order(stream, self.current))


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Return a trace that sees the streams of Megatron-Core."""
    trace = Trace()
    take_gpu_branches(monkeypatch.setattr)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(trace))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: trace.current)
    monkeypatch.setattr(torch.cuda, "stream", trace.on)
    monkeypatch.setattr(SharedExpertMLP, "stream", None)
    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None)
    gather = _ParamAndGradBucketGroup.start_param_sync
    monkeypatch.setattr(
        _ParamAndGradBucketGroup, "start_param_sync", lambda group, **options: trace.gather(gather, group, **options)
    )
    return trace


def races_of(model: torch.nn.Module, trace: Trace, run: Callable[[torch.nn.Module], Tensor]) -> list[str]:
    """Run a model while its parameters are gathered; return the races."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        align_param_gather=True,  # All parameters are on their way when the forward pass begins.
        bucket_size=1,
    )
    parallel = DistributedDataParallel(model.config, config, model)
    with trace:
        parallel.start_param_sync()
        run(parallel).clone()
    return trace.races


def run_moe_layer(kind: DispatchKind, trace: Trace) -> list[str]:
    """Run an MoE layer with shared experts, which overlap with Megatron-Core's dispatch; return the races."""
    config = make_config(
        params_dtype=torch.bfloat16,
        bf16=True,
        ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=16,
        moe_shared_expert_gate=True,
        moe_shared_expert_overlap=kind is DispatchKind.STOCK,
        moe_z_loss_coeff=1e-3,
    )
    mask = make_mask(random_visible_sets(0, 1, 30, 4, (2, 3)))
    layer = make_layer(config, mask)
    layer.dispatcher = build_dispatcher(kind, layer, process_groups())
    token_ids = TokenIds(torch.randint(0, 30, (1, 12), device=DEVICE))
    if kind is DispatchKind.PLANNED:
        let_one_rank_plan(layer.router.visible_experts, mask)
        token_ids = plan_ids(layer, token_ids)
    hidden = torch.randn(12, 1, 8, device=DEVICE, dtype=torch.bfloat16)
    return races_of(layer, trace, lambda layer: layer(hidden.clone(), padding_mask=pack_token_ids(token_ids))[0])


def run_delta_net(wait: Callable[[torch.nn.Module], None], trace: Trace) -> list[str]:
    """Run a gated delta net whose convolution waits as `wait` lets it; return the races."""
    layer = make_gated_delta_net()
    wait(layer)
    hidden = torch.randn(12, 1, layer.config.hidden_size, device=DEVICE)
    return races_of(layer, trace, lambda layer: layer(hidden_states=hidden, attention_mask=None)[0])


def nothing(*_unused: object) -> None:
    """Wait for nothing."""


@pytest.mark.parametrize("kind", [DispatchKind.STOCK, DispatchKind.PLANNED])
def test_streams_are_ordered(kind: DispatchKind, trace: Trace) -> None:
    assert run_moe_layer(kind, trace) == []


@pytest.mark.parametrize(("wait", "races"), [(wait_for_convolutions, []), (nothing, ["aten.convolution.default"])])
def test_convolution_waits_for_its_parameters(wait: Callable, races: list[str], trace: Trace) -> None:
    assert run_delta_net(wait, trace) == races


@pytest.mark.parametrize(
    ("kind", "owner", "wait", "races"),
    [
        (DispatchKind.STOCK, experts, "wait_for_parameters", ["aten.stack.default"] * 2),
        (DispatchKind.STOCK, stock, "wait_for_parameters", ["aten.mm.default"]),  # gate
        (DispatchKind.STOCK, SharedExpertMLP, "wait_current_stream", ["aten.mm.default"] * 2),  # gate, first layer
        (DispatchKind.STOCK, None, "wait_stream", ["aten.add_.Tensor"]),
        (DispatchKind.PLANNED, router, "wait_for_parameters", ["aten._to_copy.default"]),
    ],
)
def test_wait_that_is_left_out_is_reported(
    kind: DispatchKind, owner: Any, wait: str, races: list[str], trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an owner, the host's stream does not wait for the shared experts."""
    monkeypatch.setattr(owner or trace.main, wait, nothing)
    assert run_moe_layer(kind, trace) == races
