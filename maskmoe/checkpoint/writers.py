"""Starts the processes that write checkpoints asynchronously, which end with their rank, not earlier and not later."""

import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing.process import BaseProcess

from megatron.training.async_utils import init_persistent_async_worker

from maskmoe.processes.interruption import RANK_PROCESS, SIGNALS_THAT_SAVE, end_with_parent

rank_is_ending = threading.Event()
"""Is set when this rank ends, and ends its writer."""


def start_writers(rank: int) -> None:
    """Start Megatron's processes for asynchronous saves, before Megatron would start them; call this once.

    A signal that asks for a last checkpoint goes to the whole process group and would kill the writer before it has
    written the checkpoint, so the processes inherit that `SIGNALS_THAT_SAVE` are blocked. When the rank is killed, the
    writer must not stay, and write into the folder that the rank's successor saves to. When the writer is killed,
    Megatron would wait for the writer forever.
    """
    process, is_starting = os.getpid(), True
    # The process that holds the queue of results is forked. The writer is a new process that prepares itself.
    os.register_at_fork(after_in_child=lambda: is_starting and end_with_parent(process))
    os.environ[RANK_PROCESS] = str(process)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_THAT_SAVE)
    try:
        init_persistent_async_worker(rank, "spawn")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[RANK_PROCESS]
        is_starting = False
    for child in multiprocessing.active_children():
        if child.daemon:
            threading.Thread(target=end_with_writer, args=(child,), daemon=True).start()


def end_with_writer(writer: BaseProcess) -> None:
    """Wait for the end of the process that writes checkpoints; unless this rank has ended it, end this rank, too."""
    multiprocessing.connection.wait([writer.sentinel])
    time.sleep(1)  # Megatron may be ending the writer: only one thread can read the exit code
    if writer.exitcode and not rank_is_ending.is_set():
        print(
            f"error: the process that writes checkpoints has died (host {socket.gethostname()}, process {writer.pid}, "
            f"exit code {writer.exitcode}); a killed process (-9) may mean that the host is out of memory. Start the "
            "run again: it resumes from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
