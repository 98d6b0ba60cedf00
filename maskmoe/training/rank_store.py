"""What ranks tell each other before, and beside, Megatron's process groups."""

import functools
import json
import os
import time
import uuid
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store

_TIMEOUT = timedelta(hours=1)
_POLL = 0.05  # seconds


class RankStore:
    """Messages between the ranks of a run over the store at which they meet.

    It needs no process group, so it serves while there is none, and from a thread beside the one that is busy with a
    collective.

    Args:
        store: shared by the ranks; None where this process is the only one.
        rank: this process's.
        world_size: number of ranks.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int):
        self._store = store
        self.rank = rank
        self.world_size = world_size

    @classmethod
    @functools.cache
    def from_environment(cls) -> "RankStore":
        """Meet the other ranks as torchrun's variables say; without them, this process is alone."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(None, 0, 1)
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))
        session = _meet(store, rank, world_size)
        return cls(PrefixStore(session, store), rank, world_size)

    @property
    def for_process_groups(self) -> Store | None:
        """A part of the store for `torch.distributed.init_process_group`."""
        return self._store and PrefixStore("process groups", self._store)

    def gather(self, key: str, message: str) -> list[str]:
        """The messages of all ranks, by rank; to be called by all of them, once for each key."""
        if self._store is None:
            return [message]
        self.put(f"{key}/{self.rank}", message)
        return [self._store.get(f"{key}/{rank}").decode() for rank in range(self.world_size)]

    def broadcast(self, key: str, message: str | None = None) -> str:
        """The message of the first rank, which alone passes one; to be called by all of them, once for each key."""
        if self._store is None:
            return message
        if self.rank == 0:
            self.put(key, message)
        return self._store.get(key).decode()

    def beside(self) -> "RankStore":
        """The same over a connection of its own, for another thread."""
        return RankStore(self._store and self._store.clone(), self.rank, self.world_size)

    def put(self, key: str, message: str) -> None:
        """Leave a message, in place of an earlier one."""
        if self._store is not None:
            self._store.set(key, message)

    def put_first(self, key: str, message: str) -> str:
        """Leave a message unless there is one; return the one that is there then."""
        return message if self._store is None else self._store.compare_set(key, "", message).decode()

    def peek(self, key: str) -> str | None:
        """A message, if it was left already; a process that is alone hears nobody."""
        if self._store is None or not self._store.check([key]):
            return None
        return self._store.get(key).decode()


def _meet(store: Store, rank: int, world_size: int) -> str:
    """A name that only these incarnations of the ranks know.

    torchrun's store outlives the ranks that it restarts, also for process groups, and nothing else tells ranks on all
    nodes which attempt this is (`TORCHELASTIC_RESTART_COUNT` is each node's own count). Taking an answer that was meant
    for ranks of an earlier attempt, they would wait for, or connect to, processes that are gone.

    Each rank says who it is. The first tells whom it heard, with the name, and confirms it once all have found
    themselves in the list.
    """
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    return _welcome_all(store, world_size) if rank == 0 else _wait_for_welcome(store, rank, me)


def _welcome_all(store: Store, world_size: int) -> str:
    hellos = [f"hello/{rank}" for rank in range(world_size)]
    store.wait(hellos)
    while True:
        ranks = [hello.decode() for hello in store.multi_get(hellos)]
        session = uuid.uuid4().hex
        store.set("welcome", json.dumps({"session": session, "ranks": ranks}))
        heard = [f"heard/{session}/{rank}" for rank in range(1, world_size)]
        while not store.check(heard):
            time.sleep(_POLL)
            if [hello.decode() for hello in store.multi_get(hellos)] != ranks:
                break  # one of them was of an earlier attempt
        else:
            store.set(f"confirmed/{session}", "")
            return session


def _wait_for_welcome(store: Store, rank: int, me: str) -> str:
    store.wait(["welcome"])
    while True:
        welcome = json.loads(store.get("welcome"))
        session = welcome["session"]
        if welcome["ranks"][rank] == me:
            store.set(f"heard/{session}/{rank}", "")
            if store.check([f"confirmed/{session}"]):
                return session
        time.sleep(_POLL)
