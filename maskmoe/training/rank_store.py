"""Messages between ranks, before and beside Megatron's process groups."""

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
    """Messages between the ranks of a run, over the store at which the ranks meet.

    The store works without process groups, and from a thread while another thread is busy with a collective.

    Args:
        store: Store that the ranks share; None if this process is the only rank.
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int) -> None:
        self._store = store
        self.rank = rank
        self.world_size = world_size

    @classmethod
    @functools.cache
    def from_environment(cls) -> "RankStore":
        """Meet the other ranks as torchrun's variables say; without these variables, this process is the only rank."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(None, 0, 1)
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))
        session = _meet(store, rank, world_size)
        return cls(PrefixStore(session, store), rank, world_size)

    @property
    def for_process_groups(self) -> Store | None:
        """The part of the store for `torch.distributed.init_process_group`."""
        return self._store and PrefixStore("process groups", self._store)

    def gather(self, key: str, message: str) -> list[str]:
        """Return the messages of all ranks, ordered by rank; all ranks must call this once for each key."""
        if self._store is None:
            return [message]
        self.put(f"{key}/{self.rank}", message)
        return [self._store.get(f"{key}/{rank}").decode() for rank in range(self.world_size)]

    def broadcast(self, key: str, message: str = "") -> str:
        """Return the message of the first rank; all ranks must call this once for each key.

        Args:
            key: Name of the message.
            message: The message; ignored on all ranks but the first.
        """
        if self._store is None:
            return message
        if self.rank == 0:
            self.put(key, message)
        return self._store.get(key).decode()

    def beside(self) -> "RankStore":
        """Return the same messages over a connection of its own, for another thread."""
        return RankStore(self._store and self._store.clone(), self.rank, self.world_size)

    def put(self, key: str, message: str) -> None:
        """Leave a message, which replaces an earlier message of the same key."""
        if self._store is not None:
            self._store.set(key, message)

    def put_first(self, key: str, message: str) -> str:
        """Leave a message unless the key has one already; return the message that the key has then."""
        return message if self._store is None else self._store.compare_set(key, "", message).decode()

    def peek(self, key: str) -> str | None:
        """Return a message, or None if no rank has left one; a process that is the only rank gets None."""
        if self._store is None or not self._store.check([key]):
            return None
        return self._store.get(key).decode()


def _meet(store: Store, rank: int, world_size: int) -> str:
    """Return a session name that only the ranks of this attempt know.

    torchrun's store outlives the ranks that torchrun restarts. Nothing else tells ranks on all nodes which attempt they
    belong to: `TORCHELASTIC_RESTART_COUNT` counts the restarts of one node. A rank that took an answer meant for an
    earlier attempt would wait for, or connect to, processes that have ended.

    Every rank writes who it is. The first rank lists the ranks that it heard, together with a session name, and
    confirms the session once all ranks have found themselves in the list.
    """
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    return _welcome_all(store, world_size) if rank == 0 else _wait_for_welcome(store, rank, me)


def _welcome_all(store: Store, world_size: int) -> str:
    """Offer sessions until all ranks have accepted one; the first rank's part of `_meet`."""
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
                break  # a rank in the list was of an earlier attempt
        else:
            store.set(f"confirmed/{session}", "")
            return session


def _wait_for_welcome(store: Store, rank: int, me: str) -> str:
    """Accept the session whose list has this process; the part of all other ranks in `_meet`."""
    store.wait(["welcome"])
    while True:
        welcome = json.loads(store.get("welcome"))
        session = welcome["session"]
        if welcome["ranks"][rank] == me:
            store.set(f"heard/{session}/{rank}", "")
            if store.check([f"confirmed/{session}"]):
                return session
        time.sleep(_POLL)
