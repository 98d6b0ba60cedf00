"""Count what a piece of work costs besides time: launches, collectives and their bytes, and waits of the host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALL_TO_ALL = "alltoall_base_"
# Operations that compute nothing. Scalars of Python become tensors by `lift_fresh`.
_NOT_COMPUTED = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"),
    *("lift_fresh", "detach", "set_", "resize_", "is_same_size", "_local_scalar_dense", "barrier"),
}
# Functions that read the values of a tensor into Python.
_READS = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__}


@dataclass(frozen=True)
class Cost:
    """The costs of one rank.

    Attributes:
        all_to_alls: all-to-alls of floating-point numbers.
        all_to_all_bytes: bytes put into these all-to-alls, including the bytes that a rank sends to itself.
        other_collectives: exchanges of counts and ids, reductions of losses and gradients.
        host_waits: how often the host waited for the device.
        launches: operations that a GPU computes. Views and allocations are none. An operation launches one kernel or a
            few. Compiled functions count as their operations, and custom kernels are not seen.
        operations: the names of these operations in their order.
    """

    all_to_alls: int
    all_to_all_bytes: int
    other_collectives: int
    host_waits: int
    launches: int
    operations: str

    def __str__(self) -> str:
        return (
            f"{self.all_to_alls} all-to-alls of {self.all_to_all_bytes / 2**20:.1f} MiB, "
            f"{self.other_collectives} other collectives, {self.host_waits} host waits, {self.launches} operations"
        )


def cost_of(work: Callable[[], object]) -> Cost:
    """Do the work, forward and backward passes included, and return its cost."""
    operations, waits = Operations(), _HostWaits()
    # Inside a dispatch mode, torch.compile runs a function eagerly, and torch 2.11 never compiles the function later.
    # With `force_eager`, torch.compile leaves the function alone, so that later calls are compiled.
    with torch.compiler.set_stance("force_eager"), waits.seeing_all(), operations, waits:
        work()
    return Cost(
        operations.all_to_alls,
        operations.all_to_all_bytes,
        operations.other_collectives,
        waits.count + operations.waits,
        len(operations.names),
        " ".join(operations.names),
    )


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU computes, and the collectives among them.

    Attributes:
        names: the names of the operations in their order, collectives included.
        all_to_alls, all_to_all_bytes, other_collectives: see `Cost`.
        waits: operations that wait because values decide about the size of their result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.all_to_alls = self.all_to_all_bytes = self.other_collectives = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call, and do it."""
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _NOT_COMPUTED):
            self.names.append(name)
        if func.namespace == "c10d" and name != "barrier":
            if name == _ALL_TO_ALL and args[1].is_floating_point():
                self.all_to_alls += 1
                self.all_to_all_bytes += args[1].nbytes
            else:
                self.other_collectives += 1
        if torch.Tag.dynamic_output_shape in func.tags:
            # An index waits only if it is a mask.
            is_index = func is torch.ops.aten.index.Tensor
            self.waits += not is_index or any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


class _HostWaits(TorchFunctionMode):
    """Counts how often the host waits for the device; on a CPU, how often the host would wait for a GPU.

    A copy to the host is one wait. The copy, and all tensors computed from it, are then on the host and cost no wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        # Tensors on the host. The list keeps them alive, so that no new tensor gets the identity of an old one.
        self._on_host: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the call, and count it if it makes the host wait."""
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = bool(tensors) and all(any(tensor is known for known in self._on_host) for tensor in tensors)
        is_copy = func is Tensor.cpu or (func is Tensor.to and "cpu" in (*args[1:], (kwargs or {}).get("device")))
        if not on_host and (func in _READS or is_copy):
            # The host waits for an event before it reads what an asynchronous copy brings.
            self.count += not (kwargs or {}).get("non_blocking", False)
            on_host = True
        return self._mark_on_host(result) if on_host else result

    @contextmanager
    def seeing_all(self) -> Iterator[None]:
        """Also count waits that a function mode does not intercept by itself.

        - The mode is off while an intercepted function runs, also in the backward pass.
        - Megatron's dispatcher copies on a stream of its own and waits for an event.
        - Without Transformer Engine, Megatron's dispatcher keeps the constant order of its chunks on the host.
        - Megatron compares states of random numbers, which are on the host.
        """
        run_backward = torch.autograd._engine_run_backward
        copy, rng_state = token_dispatcher.maybe_move_tensor_to_cpu, torch.get_rng_state
        sort_chunks = token_dispatcher.sort_chunks_by_idxs
        event_wait, stream_wait = torch.cuda.Event.synchronize, torch.cuda.Stream.synchronize

        def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run_backward(*args, **kwargs)

        def copy_without_waiting(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return self._mark_on_host(copy(*args, **kwargs))

        def sort_chunks_of_known_order(rows: Tensor, sizes: Tensor, order: Tensor, **options: Any) -> Any:
            if not options.get("fused"):
                self._mark_on_host(order)
            return sort_chunks(rows, sizes, order, **options)

        def counted(original: Callable[[Any], None]) -> Callable[[Any], None]:
            def wait(waited_for: Any) -> None:
                self.count += 1
                original(waited_for)

            return wait

        with (
            patch.object(torch.autograd, "_engine_run_backward", run_backward_in_mode),
            patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", copy_without_waiting),
            patch.object(token_dispatcher, "sort_chunks_by_idxs", sort_chunks_of_known_order),
            patch.object(torch, "get_rng_state", lambda: self._mark_on_host(rng_state())),
            patch.object(torch.cuda.Event, "synchronize", counted(event_wait)),
            patch.object(torch.cuda.Stream, "synchronize", counted(stream_wait)),
        ):
            yield

    def _mark_on_host(self, result: Any) -> Any:
        """Remember the tensors of a result as being on the host; return the result."""
        self._on_host += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result
