"""Starts the processes of asynchronous saving so that they end together with their rank, and not before.

If such a process dies nevertheless, for example because its host is out of memory, the rank fails.

SIGTERM and SIGUSR1, which ask a run for a last checkpoint, reach all processes of a process group. They would kill the
processes that write the checkpoint. A process inherits the blocked signals of its parent, so the rank blocks these
signals while it starts such a process.
"""

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from queue import Empty, Queue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from maskmoe.errors import RunFailure
from maskmoe.megatron_compat.replacing import replace
from maskmoe.processes.interruption import SIGNALS_THAT_SAVE
from maskmoe.processes.liveness import end_with_parent

_RANK_PROCESS = "MASKMOE_RANK_PROCESS"
_CHECK_PERIOD = 1.0  # seconds
_stock_get_process: Callable[..., BaseProcess] = PersistentAsyncCaller._get_process
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


class WriterQueue:
    """A queue between this rank and its writer, whose calls fail if the writer has died: Megatron would wait forever.

    Args:
        queue: Megatron's queue; a `JoinableQueue` if `join` is called.
        writer: the process at the other end of the queue.
    """

    def __init__(self, queue: Any, writer: BaseProcess) -> None:
        self._queue, self._writer = queue, writer
        # Nobody may be left to read what this process has put, so do not wait for a reader at the end of this process.
        queue.cancel_join_thread()

    def put(self, item: Any) -> None:
        """Put an item if the writer lives."""
        if not self._writer.is_alive():
            raise self._failure()
        self._queue.put(item)

    def get_nowait(self) -> Any:
        """Return the next item; raise `Empty` if there is none yet."""
        is_alive = self._writer.is_alive()
        try:
            return self._queue.get_nowait()
        except Empty:
            if not is_alive:
                raise self._failure() from None
            raise

    def join(self) -> None:
        """Wait until the writer has processed all items."""
        waiting = threading.Thread(target=self._queue.join, daemon=True)
        waiting.start()
        while waiting.is_alive():
            # The writer may end as soon as it has processed the last item, so look at the writer first.
            is_alive = self._writer.is_alive()
            waiting.join(_CHECK_PERIOD)
            if not is_alive and waiting.is_alive():
                raise self._failure()

    def _failure(self) -> RunFailure:
        return RunFailure(
            f"the process that writes checkpoints has died (host {socket.gethostname()}, process {self._writer.pid}, "
            f"exit code {self._writer.exitcode}); a killed process (-9) may mean that the host is out of memory. Start "
            "the run again: it resumes from its last checkpoint"
        )


def start_writer(*args: Any) -> BaseProcess:
    """Return the process that writes the checkpoints of this rank; start the process if there is none.

    Args:
        *args: the arguments of `PersistentAsyncCaller._get_process`, which this function replaces.
    """
    caller = PersistentAsyncCaller
    if caller._persistent_process is not None:
        return caller._persistent_process
    with immune_children():
        writer = _stock_get_process(*args)
    replace(caller, "_persistent_queue", WriterQueue(caller._persistent_queue, writer))
    replace(caller, "_persistent_preload_q", WriterQueue(caller._persistent_preload_q, writer))
    replace(caller, "_persistent_comp_q", WriterQueue(caller._persistent_comp_q, writer))
    return writer


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
