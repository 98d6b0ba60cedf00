"""The processes that asynchronous saving needs: they end with the rank that started them, and not before.

Signals that ask for a last checkpoint go to whole process groups. A signal that is blocked when a process starts stays
so in it.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from maskmoe.child_process import end_with_parent
from maskmoe.interruption import SIGNALS_THAT_SAVE

_RANK_PROCESS = "MASKMOE_RANK_PROCESS"
_stock_async_loop: Callable[..., None] = PersistentAsyncCaller.async_loop
_managers: list[SyncManager] = []


@contextmanager
def immune_children() -> Iterator[None]:
    """Processes that are started in this block do not get `SIGNALS_THAT_SAVE`, and know who started them."""
    os.environ[_RANK_PROCESS] = str(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_THAT_SAVE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_for_rank(*args: Any) -> None:
    """`PersistentAsyncCaller.async_loop` in a process that ends with the rank it writes for.

    Its parent is a fork server, which stays as long as it has a child. So the rank itself is watched.
    """
    threading.Thread(target=_end_with, args=(int(os.environ[_RANK_PROCESS]),), daemon=True).start()
    _stock_async_loop(*args)


def _end_with(process: int) -> None:
    """Kill this process when another ends."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


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
