"""The ranks of a run exchange messages before Megatron makes process groups; and the end of these groups."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, and the store at which torch lets them meet. Megatron's process groups use the same store.

    When a rank refuses the run and exits, torchrun ends the ranks that wait for it.
    """

    store: Store
    rank: int
    world_size: int

    def gather(self, key: str, message: str) -> list[str]:
        """Return the messages of all ranks, ordered by rank; all ranks must call this once for each key.

        The first rank returns last: its process may hold the store, which ends with it if the messages refuse the run.
        """
        self.store.set(f"{key}/{self.rank}", message)
        # One request for all messages: thousands of ranks ask the same store. The store waits for missing messages.
        messages = self.store.multi_get([f"{key}/{number}" for number in range(self.world_size)])
        if self.store.add(f"{key}/readers", 1) == self.world_size:
            self.store.set(f"{key}/all have read", "")
        if self.rank == 0:
            self.store.wait([f"{key}/all have read"])
        return [message.decode() for message in messages]

    def broadcast(self, key: str, message: str = "") -> str:
        """Return the message of the first rank; all ranks must call this once for each key."""
        if self.rank == 0:
            self.store.set(key, message)
        return self.store.get(key).decode()


def meet_ranks(args: Namespace) -> Ranks:
    """Wait for all ranks of torchrun, and return the same object at each call; without torchrun, of one rank."""
    return _meet(timedelta(minutes=args.distributed_timeout_minutes))


@cache
def _meet(timeout: timedelta) -> Ranks:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(HashStore(), 0, 1)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # A store of torchrun outlives the ranks that torchrun restarts, with their messages.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return Ranks(store, rank, world_size)


@contextmanager
def temporary_process_groups() -> Iterator[None]:
    """Destroy the process groups when the block succeeds or ends by `sys.exit`, as Megatron's training loop may end.

    At exit, gloo's threads could outlive the memory that they use and abort the process after all work is done.
    """
    try:
        yield
    finally:
        if isinstance(sys.exception(), SystemExit | None) and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
