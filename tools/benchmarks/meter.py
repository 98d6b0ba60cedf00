"""What a piece of work costs besides time: collectives, the bytes put into them, and waits of the host."""

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
# How Python learns what a tensor holds.
_READS = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__}


@dataclass(frozen=True)
class Cost:
    """What one rank did.

    Attributes:
        all_to_alls: of floating-point numbers.
        all_to_all_bytes: put into them, the rank's own share included.
        other_collectives: counts, ids, reductions of losses and gradients.
        host_waits: how often the host waited for the device.
    """

    all_to_alls: int
    all_to_all_bytes: int
    other_collectives: int
    host_waits: int

    def __str__(self) -> str:
        return (
            f"{self.all_to_alls} all-to-alls of {self.all_to_all_bytes / 2**20:.1f} MiB, "
            f"{self.other_collectives} other collectives, {self.host_waits} host waits"
        )


def cost_of(work: Callable[[], object]) -> Cost:
    """Do some work, forward and backward, and count."""
    collectives, waits = _Collectives(), _HostWaits()
    with waits.seeing_all(), collectives, waits:
        work()
    return Cost(collectives.all_to_alls, collectives.all_to_all_bytes, collectives.others, waits.count)


class _Collectives(TorchDispatchMode):
    """Counts the collectives that tensors go through."""

    def __init__(self) -> None:
        super().__init__()
        self.all_to_alls = self.all_to_all_bytes = self.others = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and function.overloadpacket.__name__ != "barrier":
            if function.overloadpacket.__name__ == _ALL_TO_ALL and args[1].is_floating_point():
                self.all_to_alls += 1
                self.all_to_all_bytes += args[1].nbytes
            else:
                self.others += 1
        return function(*args, **(kwargs or {}))


class _HostWaits(TorchFunctionMode):
    """Counts how often the host waits for what the device computes; on a CPU, how often it would for a GPU.

    A copy to the host is a wait, and what it returns, and whatever is made of that, is at hand from then on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._on_host: list[Tensor] = []  # they live on, so that none of them is taken for another

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = bool(tensors) and all(any(tensor is known for known in self._on_host) for tensor in tensors)
        if not on_host and (function in _READS or function is Tensor.cpu):
            self.count += 1
            on_host = True
        return self._at_hand(result) if on_host else result

    @contextmanager
    def seeing_all(self) -> Iterator[None]:
        """See also what such a mode does not by itself.

        While it runs what it has intercepted, it is off: also in the backward pass. Megatron's dispatcher copies on a
        stream of its own and waits for an event; and Megatron compares states of random numbers, which are the host's.
        """
        run_backward = torch.autograd._engine_run_backward
        copy, rng_state = token_dispatcher.maybe_move_tensor_to_cpu, torch.get_rng_state
        event_wait, stream_wait = torch.cuda.Event.synchronize, torch.cuda.Stream.synchronize

        def run_backward_in_sight(*args, **kwargs) -> Any:
            with self:
                return run_backward(*args, **kwargs)

        def copy_without_waiting(*args, **kwargs) -> Any:
            with torch._C.DisableTorchFunction():
                return self._at_hand(copy(*args, **kwargs))

        def wait(original: Callable[[Any], None]) -> Callable[[Any], None]:
            def counted(waited_for: Any) -> None:
                self.count += 1
                original(waited_for)

            return counted

        with (
            patch.object(torch.autograd, "_engine_run_backward", run_backward_in_sight),
            patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", copy_without_waiting),
            patch.object(torch, "get_rng_state", lambda: self._at_hand(rng_state())),
            patch.object(torch.cuda.Event, "synchronize", wait(event_wait)),
            patch.object(torch.cuda.Stream, "synchronize", wait(stream_wait)),
        ):
            yield

    def _at_hand(self, result: Any) -> Any:
        self._on_host += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result
