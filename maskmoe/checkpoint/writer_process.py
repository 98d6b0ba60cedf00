"""The processes that asynchronous saving needs: they end with the rank that started them, and not before.

Signals that ask for a last checkpoint go to whole process groups. A signal that is blocked when a process starts stays
so in it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from maskmoe.child_process import end_with_parent
from maskmoe.interruption import SIGNALS_THAT_SAVE

_stock_async_loop: Callable[..., None] = PersistentAsyncCaller.async_loop
_managers: list[SyncManager] = []


@contextmanager
def immune_children() -> Iterator[None]:
    """Processes that are started in this block do not get `SIGNALS_THAT_SAVE`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_THAT_SAVE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_for_parent(*args: Any) -> None:
    """`PersistentAsyncCaller.async_loop` in a process that ends with its parent."""
    end_with_parent(os.getppid())
    _stock_async_loop(*args)


def get_write_results_queue(mp_mode: str = "spawn"):
    """The function of that name in Megatron-Core, with a process for the queue that ends with this one.

    Args:
        mp_mode: how that process is started.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=torch.multiprocessing.get_context(mp_mode))
        with immune_children():
            manager.start(end_with_parent, (os.getpid(),))
        _managers.append(manager)  # without a reference to it, it would shut down
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue
