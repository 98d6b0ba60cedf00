"""Messages between ranks, before and beside Megatron's process groups."""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import ClassVar

import psutil
from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

from maskmoe.errors import RunFailure, UserError, listed
from maskmoe.processes.console import console, rank_of_process
from maskmoe.processes.network import connection_error

_TIMEOUT = timedelta(hours=1)
_PATIENCE = 5.0  # seconds before a waiting rank says for whom it waits
_LATE_START = 60.0  # seconds for which a rank with a failure waits for ranks that start later
_FAILURE = "failure"
_MOST_NAMED_RANKS = 8


@dataclass(frozen=True)
class RankStore:
    """Messages between the ranks of a run, over the store at which the ranks meet.

    The store works without process groups, and from a thread while another thread is busy with a collective. A rank
    that waits for a message raises the failure of another rank, see `sharing_failures`. `of_process` is the store of
    this process, once its rank has met the other ranks.
    """

    store: Store
    rank: int
    world_size: int
    of_process: ClassVar["RankStore | None"] = None

    @classmethod
    def from_environment(cls) -> "RankStore":
        """Meet the other ranks as torchrun's variables say; without these variables, this process is the only rank.

        Further calls return the same store. Raises `UserError` if `RANK` is not below `WORLD_SIZE`.
        """
        if cls.of_process is None:
            cls.of_process = cls._meet_other_ranks()
        return cls.of_process

    @classmethod
    def _meet_other_ranks(cls) -> "RankStore":
        rank, world_size = rank_of_process()
        if rank >= world_size:
            raise UserError(f"RANK={rank} is not one of the ranks 0 to {world_size - 1} of WORLD_SIZE={world_size}")
        interfaces = filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
        if missing := sorted({*interfaces} - psutil.net_if_addrs().keys()):
            raise UserError(f"GLOO_SOCKET_IFNAME: this host has no network interface {missing[0]}")
        if world_size == 1:
            return cls(HashStore(), 0, 1)
        store = _open_store(rank)
        session = _meet(store, rank, world_size)
        return cls(PrefixStore(session, store), rank, world_size)

    @property
    def for_process_groups(self) -> Store | None:
        """The part of the store for `torch.distributed.init_process_group`; None for a single rank."""
        return PrefixStore("process groups", self.store) if self.world_size > 1 else None

    def gather(self, key: str, message: str) -> list[str]:
        """Return the messages of all ranks, ordered by rank; all ranks must call this once for each key."""
        self.store.set(f"{key}/{self.rank}", message)
        self.wait_for_all(key)
        return self.read_all(key)

    def read_all(self, key: str) -> list[str]:
        """Return the messages `KEY/RANK` that all ranks have left, ordered by rank.

        This is one request: if thousands of ranks asked for each message, the store would be busy for minutes.
        """
        return [message.decode() for message in self.store.multi_get([f"{key}/{n}" for n in range(self.world_size)])]

    def broadcast(self, key: str, message: str = "") -> str:
        """Return the message of the first rank; all ranks must call this once for each key."""
        if self.rank == 0:
            self.store.set(key, message)
        return self._wait_for(key)

    def wait_for_all(self, key: str) -> None:
        """Return when all ranks have called this; all ranks must call this once for each key."""
        if self.store.add(f"{key}/ranks", 1) == self.world_size:
            self.store.set(f"{key}/all", "")
        self._wait_for(f"{key}/all")

    def beside(self) -> "RankStore":
        """Return the same messages over a connection of its own, for another thread."""
        return replace(self, store=self.store.clone())

    def peek(self, key: str) -> str | None:
        """Return a message, or None if no rank has left one."""
        return self.store.get(key).decode() if self.store.check([key]) else None

    def leave_failure(self, error: Exception) -> None:
        """Let the other ranks fail with this rank's failure, and wait until all ranks know the failure."""
        # This rank may have the failure from another rank.
        if not self.store.check([_FAILURE]):
            place = f"rank {self.rank} on host {socket.gethostname()}"
            self.store.set(_FAILURE, json.dumps([isinstance(error, UserError), f"{error} ({place})"]))
        self._wait_until_failure_is_known()

    def raise_failure(self) -> None:
        """Raise the failure that another rank has left, if there is one, once all ranks know the failure."""
        if self.store.check([_FAILURE]):
            is_refusal, text = json.loads(self.store.get(_FAILURE))
            self._wait_until_failure_is_known()
            raise UserError(text) if is_refusal else RunFailure(text)

    def _wait_until_failure_is_known(self) -> None:
        self.wait_until_known(_FAILURE, _LATE_START if RankStore.of_process is None else _PATIENCE)

    def wait_until_known(self, key: str, seconds: float) -> None:
        """Wait at most some seconds until all ranks have called this for a message; a second call does not wait.

        Call this before a rank ends: the end of a rank breaks the collectives of other ranks, and may end the store.
        """
        ranks = [f"{key} is known to {number}" for number in range(self.world_size)]
        with suppress(RuntimeError):  # the store has ended
            if self.store.check([ranks[self.rank]]):
                return
            self.store.set(ranks[self.rank], "")
            deadline = time.monotonic() + seconds
            while not self.store.check(ranks) and time.monotonic() < deadline:
                time.sleep(_poll_seconds(self.world_size))

    def _wait_for(self, key: str) -> str:
        """Return a message once a rank has left it; raise another rank's failure, or a TimeoutError after an hour."""
        deadline = time.monotonic() + _TIMEOUT.total_seconds()
        # Waiting in the store would not notice a failure, or log a warning at each time limit.
        while (message := self.peek(key)) is None:
            self.raise_failure()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no rank has left the message {key} for {_TIMEOUT}")
            time.sleep(_poll_seconds(self.world_size))
        return message


@contextmanager
def sharing_failures() -> Iterator[None]:
    """Let all ranks that wait for a message, or to meet this rank, fail with this rank's failure.

    Before the ranks have met, only a refusal is shared: torchrun may restart a rank that failed.
    """
    try:
        yield
    except Exception as error:
        with suppress(DistError):  # the store has ended with another rank
            if (ranks := _ranks_to_inform(error)) is not None:
                ranks.leave_failure(error)
        raise


def _ranks_to_inform(failure: Exception) -> RankStore | None:
    """Return the store in which the other ranks see a failure of this rank; None if there is none."""
    if RankStore.of_process is not None:
        return RankStore.of_process
    with suppress(UserError):
        rank, world_size = rank_of_process()
        if isinstance(failure, UserError) and world_size > 1:
            check_launched()
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            if connection_error(host, port) is None:
                store = TCPStore(host, port, None, False, timedelta(seconds=_PATIENCE), wait_for_workers=False)
                return RankStore(store, rank, world_size)
    return None


def check_launched() -> None:
    """Refuse, by a UserError, to be a rank that no launcher has started, before torch does so with a traceback."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"this process was not started as a rank, {' and '.join(missing)} are not set: start it by torchrun, by "
            "`maskmoe pretrain` or `evaluate`, or by launch/pretrain.sh"
        )
    port = os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and int(port[:9]) < 1 << 16):
        raise UserError(f"MASTER_PORT={port} is not a port: set a free port, 1 to 65535")


def _open_store(rank: int) -> Store:
    """Connect to the store at which the ranks meet, which torchrun hosts, or else rank 0. Raises UserError."""
    check_launched()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if is_host and connection_error(host, port) is None:
        raise UserError(f"another process listens at MASTER_PORT={port} already: set a free port")
    if not is_host and connection_error(host, port) is not None:
        console.say(f"waiting for rank 0 at {host}:{port}: check that it was started, and MASTER_ADDR", rank=rank)
    # `torch.distributed.rendezvous` would wait here for all ranks without a word.
    return TCPStore(host, port, None, is_host, _TIMEOUT, wait_for_workers=False, multi_tenant=True)


def _meet(store: Store, rank: int, world_size: int) -> str:
    """Return a session name that only the ranks of this attempt know.

    torchrun's store outlives the ranks that torchrun restarts, and `TORCHELASTIC_RESTART_COUNT` counts the restarts of
    one node only. A rank that took an answer meant for an earlier attempt would wait for processes that have ended.

    Every rank writes who it is, and names the session after all ranks that it reads. A rank joins a session that it is
    part of. Once all ranks have joined one session, no rank in it is of an earlier attempt.
    """
    me, ranks = uuid.uuid4().hex, RankStore(store, rank, world_size)
    hellos = [f"hello/{number}" for number in range(world_size)]
    store.set(hellos[rank], me)
    start, has_said, joined = time.monotonic(), os.environ.get("LOCAL_RANK", "0") != "0", ""
    while True:
        ranks.raise_failure()
        if store.check(hellos):
            names = store.multi_get(hellos)
            session = hashlib.sha256(b" ".join(names)).hexdigest()
            if names[rank].decode() == me and session != joined:
                store.add(session, 1)
                joined = session
            if session == joined and store.add(session, 0) == world_size:
                return session
        seconds = time.monotonic() - start
        if seconds > _PATIENCE and not has_said:
            console.say(f"waiting for {_missing(store, hellos)}", rank=rank)
            has_said = True
        if seconds > _TIMEOUT.total_seconds():
            raise RunFailure(f"the ranks have not met within {_TIMEOUT}; missing are {_missing(store, hellos)}")
        time.sleep(_poll_seconds(world_size))


def _missing(store: Store, hellos: list[str]) -> str:
    """Return which ranks have not come to a meeting, in words."""
    missing = [str(number) for number, hello in enumerate(hellos) if not store.check([hello])]
    return f"{len(missing)} of {len(hellos)} ranks: {listed(missing, _MOST_NAMED_RANKS) or 'restarted ones'}"


def _poll_seconds(world_size: int) -> float:
    """Return the time between two questions to the store; it grows with the number of ranks, which all ask."""
    return max(0.05, world_size / 1000)
