"""Starts the processes of asynchronous saving so that they end together with their rank, and not before.

SIGTERM and SIGUSR1, which ask a run for a last checkpoint, reach all processes of a process group. They would kill the
processes that write the checkpoint. A process inherits the blocked signals of its parent, so the rank blocks these
signals while it starts such a process.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from queue import Queue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from maskmoe.child_process import end_with_parent
from maskmoe.interruption import SIGNALS_THAT_SAVE

_RANK_PROCESS = "MASKMOE_RANK_PROCESS"
_stock_async_loop: Callable[..., None] = PersistentAsyncCaller.async_loop


@contextmanager
def immune_children() -> Iterator[None]:
    """Block `SIGNALS_THAT_SAVE` in the processes that the block starts, and name this rank in their environment."""
    os.environ[_RANK_PROCESS] = str(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_THAT_SAVE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_for_rank(*args: Any) -> None:
    """Run `PersistentAsyncCaller.async_loop` in this process, which is killed when the rank that it writes for ends.

    The parent of this process is a fork server, which lives as long as it has a child. So this process watches the rank
    and not its parent.

    Args:
        *args: the arguments of `PersistentAsyncCaller.async_loop`.
    """
    threading.Thread(target=_end_with, args=(int(os.environ[_RANK_PROCESS]),), daemon=True).start()
    _stock_async_loop(*args)


def _end_with(process: int) -> None:
    """Kill this process when another process ends."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def get_write_results_queue(mp_mode: str = "spawn") -> Queue:
    """Return the queue of write results; its process ends together with this process.

    This function replaces Megatron-Core's function of the same name.

    Args:
        mp_mode: the start method of the process.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=torch.multiprocessing.get_context(mp_mode))
        with immune_children():
            manager.start(end_with_parent, (os.getpid(),))
        # The queue keeps its manager alive. The attribute is declared as None.
        filesystem_async._results_queue = manager.Queue()  # pyrefly: ignore[bad-assignment]
    return filesystem_async._results_queue  # pyrefly: ignore[bad-return]
