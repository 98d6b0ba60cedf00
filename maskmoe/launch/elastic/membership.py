"""Makes the launchers of an elastic run known to each other by files of the run folder."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import UnusableFile, check_regular, read_bounded
from maskmoe.launch.network import listen
from maskmoe.processes.folder_lock import Holder

_BEAT_SECONDS = 2.0
_CONNECT_SECONDS = 5.0
_MAX_BYTES = 4096
_MEMBER, _BEAT = ".json", ".beat"


@dataclass(frozen=True)
class Member:
    """The launcher of a node, from its start to its end.

    Attributes:
        id: a unique word.
        host: name of the host.
        pid: process id of the launcher on the host.
        started: when the process started, in seconds since the epoch.
        address: the address at which other nodes reach the host.
        port: the port at which the launcher listens, which shows whether the network connects two nodes.
        ranks: number of ranks that the node can run.
        pid_namespace: see `Holder`.
    """

    id: str
    host: str
    pid: int
    started: float
    address: str
    port: int
    ranks: int
    pid_namespace: str = ""

    @classmethod
    def this_process(cls, address: str, port: int, ranks: int) -> Self:
        """Return the member that this process is."""
        holder = Holder.this_process()
        return cls(uuid.uuid4().hex, address=address, port=port, ranks=ranks, **asdict(holder))

    @property
    def has_ended(self) -> bool:
        """Whether the launcher ran on this host and has ended."""
        holder = Holder(self.host, self.pid, self.started, self.pid_namespace)
        return holder.is_here and not holder.is_alive


@dataclass
class _Sighting:
    """The signs of life that this launcher has seen of another one.

    Attributes:
        member: the other launcher.
        beat: its newest beat; None if it has left.
        since: when this launcher saw it first.
        alive_at: when this launcher last saw a new beat; None for no new beat so far.
        reached_at: when this launcher last saw a new beat which says that it reaches this launcher.
    """

    member: Member
    beat: int | None
    since: float
    alive_at: float | None = None
    reached_at: float | None = None


class Membership:
    """Shows this launcher to the other launchers of a run, and watches them; use the object as a context manager.

    A launcher writes a number that grows, its *beat*, to a file of its own every few seconds, together with the id of
    the leader if its node reaches the leader's node by the network. The clocks of the hosts need not agree.

    Args:
        folder: the folder of the members' files; it is created if missing.
        address: the address of this host for the other hosts.
        ranks: number of ranks that this node can run.
        timeout: how long a launcher may be silent, in seconds.
    """

    def __init__(self, folder: Path, address: str, ranks: int, timeout: float) -> None:
        self._folder = folder
        self._timeout = timeout
        self._listener = listen(backlog=128)
        self.me = Member.this_process(address, self._listener.getsockname()[1], ranks)
        self._leader: Member | None = None
        self._leads_since = 0.0
        self._beat = 0
        self._sightings: dict[str, _Sighting] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._answer, self._show_and_look)]

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._show()
        self._look()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Tell the other launchers that this node no longer takes part in the run."""
        self._is_over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()
        self.remove_files_of([self.me])

    def follow(self, leader: Member | None) -> None:
        """Report from now on whether this node reaches the node of a leader, which may be this node."""
        if leader != self._leader and leader == self.me:
            self._leads_since = time.monotonic()
        self._leader = leader

    def is_gone(self, id: str) -> bool:
        """Return whether a launcher has left, has ended, or was silent for too long; False while that is unknown."""
        if id == self.me.id:
            return self._is_over.is_set()
        with self._lock:
            sighting = self._sightings.get(id)
            if sighting is None or sighting.beat is None or sighting.member.has_ended:
                return True
            return time.monotonic() - (sighting.alive_at or sighting.since) > self._timeout

    def is_cut_off(self, id: str) -> bool:
        """Return whether the node of a launcher does not reach this node, which leads, or its launcher is gone."""
        if self.is_gone(id):
            return True
        if id == self.me.id:
            return False
        with self._lock:
            sighting = self._sightings.get(id)
            # A launcher needs some time until it reports that it reaches a new leader.
            last = max(self._leads_since, sighting.since, sighting.reached_at or 0.0) if sighting else 0.0
            return time.monotonic() - last > self._timeout

    def known(self) -> list[Member]:
        """Return all launchers that are not gone, this one included, the oldest first."""
        with self._lock:
            members = [self.me, *(sighting.member for sighting in self._sightings.values())]
        return sorted(
            (member for member in members if not self.is_gone(member.id)),
            key=lambda member: (member.started, member.id),
        )

    def ready(self) -> list[Member]:
        """Return the launchers whose nodes reach this node, this one first, then the oldest first."""
        with self._lock:
            reached = {id for id, sighting in self._sightings.items() if sighting.reached_at is not None}
        others = (member for member in self.known() if member.id in reached and not self.is_cut_off(member.id))
        return [self.me, *others]

    def remove_files_of(self, members: Sequence[Member]) -> None:
        """Remove the files of launchers that are gone."""
        for member in members:
            for suffix in (_BEAT, _MEMBER):
                with suppress(OSError):
                    self._path(member.id, suffix).unlink()

    def _answer(self) -> None:
        """Accept connections, which other launchers open to find out whether they reach this one."""
        while not self._is_over.is_set():
            with suppress(OSError), closing(self._listener.accept()[0]):
                pass

    def _show_and_look(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            with suppress(OSError, UserError):  # the file system may fail for a while
                self._show()
                self._look()

    def _show(self) -> None:
        """Write this launcher's files. The beat is written in place: each reader's opening of the file asks the server.

        A launcher that was silent for long may find its files removed, so write both.
        """
        self._beat += 1
        leader = self._leader
        reaches = leader.id if leader is not None and _reaches(leader) else ""
        if not self._path(self.me.id, _MEMBER).exists():
            with atomic_output(self._path(self.me.id, _MEMBER)) as unfinished:
                unfinished.write_text(json.dumps(asdict(self.me)))
        descriptor = os.open(self._path(self.me.id, _BEAT), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(descriptor, f"{self._beat:020d} {reaches:32}\n".encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _look(self) -> None:
        """Read the files of all other launchers.

        Raises:
            OSError: the folder cannot be listed. All launchers count as before.
        """
        # `Path.glob` would return an empty list for a folder that cannot be read.
        listed = {name.removesuffix(_MEMBER) for name in os.listdir(self._folder) if name.endswith(_MEMBER)}
        for id in (listed | self._sightings.keys()) - {self.me.id}:
            if id not in listed and self._is_removed(id):
                with self._lock:
                    del self._sightings[id]
                continue
            beat, reaches = self._read_beat(id)
            with self._lock:
                sighting = self._sightings.get(id)
            if sighting is None:
                member = self._read_member(id)
                if member is None:
                    continue
                sighting = _Sighting(member, beat, time.monotonic())
            elif beat is not None and beat != sighting.beat:
                sighting.beat, sighting.alive_at = beat, time.monotonic()
                if reaches == self.me.id:
                    sighting.reached_at = time.monotonic()
            with self._lock:
                self._sightings[id] = sighting

    def _is_removed(self, id: str) -> bool:
        """Return whether a launcher's file is gone. Opening a file asks the server; a listing may come from a cache."""
        try:
            check_regular(self._path(id, _MEMBER))
        except UnusableFile as error:
            return isinstance(error.__cause__, FileNotFoundError)
        return False

    def _read_member(self, id: str) -> Member | None:
        try:
            content = json.loads(read_bounded(self._path(id, _MEMBER), _MAX_BYTES))
            member = Member(**content)
            return member if member.id == id else None
        except (UnusableFile, ValueError, TypeError):
            return None

    def _read_beat(self, id: str) -> tuple[int | None, str]:
        """Return the beat of a launcher and the id of the leader that it reaches; None while the beat is unknown."""
        try:
            beat, _, reaches = read_bounded(self._path(id, _BEAT), _MAX_BYTES).decode().partition(" ")
            return int(beat), reaches.strip()
        except (UnusableFile, ValueError):
            return None, ""

    def _path(self, id: str, suffix: str) -> Path:
        return self._folder / f"{id}{suffix}"


def _reaches(member: Member) -> bool:
    """Return whether the network connects this node with the node of a launcher."""
    try:
        socket.create_connection((member.address, member.port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
