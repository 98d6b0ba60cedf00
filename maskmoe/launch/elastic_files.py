"""Files in the run folder through which the launchers of an elastic run find each other and agree on generations."""

import os
import re
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from maskmoe.errors import RunFailure, UserError
from maskmoe.files.json_files import type_adapter
from maskmoe.files.outputs import write_text
from maskmoe.launch.machine import listen
from maskmoe.launch.model_file import Flags
from maskmoe.processes.lifetimes import Holder, beating
from maskmoe.processes.network import connection_error

_BEAT_SECONDS = 2.0
_MOST_SECONDS = 8.0  # between two beats, of which one waits 5 s for a connection; a longer pause is the file system's
_GENERATION_FILE = re.compile(r"generation-(?P<number>[0-9]+)\.json")


@dataclass(frozen=True)
class Member:
    """The launcher of a node, from its start to its end.

    Attributes:
        id: A unique word.
        process: The process.
        address: The address at which other nodes reach the host.
        port: The port at which the launcher listens, which shows whether the network connects two nodes.
        ranks: Number of ranks that the node can run.
    """

    id: str
    process: Holder
    address: str
    port: int
    ranks: int


@dataclass(frozen=True)
class _Sign:
    """The content of a launcher's file.

    Attributes:
        member: The launcher.
        beat: A number that grows.
        reaches: The id of the leader if the launcher's node reaches the leader's node by the network, else empty.
    """

    member: Member
    beat: int
    reaches: str


@dataclass
class _Sighting:
    """The signs of life that this launcher has seen of another one.

    Attributes:
        member: The other launcher.
        beat: Its newest beat.
        since: When this launcher saw it first, in seconds of `Membership`'s clock, like all times here.
        alive_at: When this launcher last saw a new beat.
        reached_at: When this launcher last saw a new beat which says that it reaches this launcher.
    """

    member: Member
    beat: int
    since: float
    alive_at: float
    reached_at: float | None = None


class Membership:
    """Shows this launcher to the other launchers of a run, and watches them; use the object as a context manager.

    Every few seconds, a launcher writes a number that grows, its *beat*, to a file of its own, together with the id of
    the leader if its node reaches the leader's node by the network. The clocks of the hosts need not agree.

    Silence is measured on a clock that stands still while this launcher itself cannot use the folder, because the
    folder may be full, or its server may stall, for all launchers.

    Args:
        folder: The folder of the members' files; it is created if missing.
        address: The address of this host for the other hosts.
        ranks: Number of ranks that this node can run.
        timeout: How long a launcher may be silent, in seconds.
    """

    def __init__(self, folder: Path, address: str, ranks: int, timeout: float) -> None:
        self._folder = folder
        self._timeout = timeout
        self._listener = listen(backlog=1024)
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        self.me = Member(uuid.uuid4().hex, Holder.this_process(), address, port, ranks)
        self._leader: Member | None = None
        self._leads_since = 0.0
        self._beat = 0
        self._clock = 0.0
        self._began = time.monotonic()  # the newest attempt to beat
        self._sightings: dict[str, _Sighting] = {}
        self._lock = threading.Lock()
        self._until_exit = ExitStack()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.beat()
        self._until_exit.callback(self.remove_files_of, [self.me])
        self._until_exit.enter_context(self._listener)
        self._until_exit.enter_context(beating(self.beat, _BEAT_SECONDS))
        return self

    def __exit__(self, *exception: object) -> None:
        self._until_exit.close()

    def follow(self, leader: Member) -> None:
        """Report from now on whether this node reaches the node of a leader, which may be this node."""
        if leader != self._leader and leader == self.me:
            self._leads_since = self.now()
        self._leader = leader

    def is_gone(self, member: Member) -> bool:
        """Return whether a launcher has left, has ended, or was silent for too long; False while that is unknown."""
        if member == self.me:
            return False
        with self._lock:
            sighting = self._sightings.get(member.id)
        return sighting is None or member.process.has_ended or self._is_over(sighting.alive_at)

    def is_cut_off(self, member: Member) -> bool:
        """Return whether the node of a launcher does not reach this node, which leads, or its launcher is gone."""
        if member == self.me:
            return False
        if self.is_gone(member):
            return True
        with self._lock:
            sighting = self._sightings.get(member.id)
        # A launcher needs some time until it reports that it reaches a new leader.
        return sighting is None or self._is_over(max(self._leads_since, sighting.reached_at or sighting.since))

    def known(self) -> list[Member]:
        """Return all launchers that are not gone, this one included, the oldest first."""
        with self._lock:
            members = [self.me, *(sighting.member for sighting in self._sightings.values())]
        here = (member for member in members if not self.is_gone(member))
        return sorted(here, key=lambda member: (member.process.started, member.id))

    def ready(self) -> list[Member]:
        """Return the launchers whose nodes reach this node, this one first, then the oldest first."""
        with self._lock:
            reached = {id for id, sighting in self._sightings.items() if sighting.reached_at is not None}
        others = (member for member in self.known() if member.id in reached and not self.is_cut_off(member))
        return [self.me, *others]

    def remove_files_of(self, members: Iterable[Member]) -> None:
        """Remove the files of launchers that are gone."""
        for member in members:
            with suppress(OSError):
                self._path(member.id).unlink()

    def beat(self) -> None:
        """Write this launcher's file, and read the files of all other launchers.

        Raises:
            OSError: The folder cannot be used. All launchers count as before.
        """
        pause, self._began = self._since_beat(), time.monotonic()
        # Accept the connections of other launchers, which find out whether they reach this one.
        with suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
        leader = self._leader
        self._beat += 1
        reaches = leader is not None and connection_error(leader.address, leader.port) is None
        sign = _Sign(self.me, self._beat, leader.id if leader is not None and reaches else "")
        unfinished = self._path(self.me.id).with_suffix(".tmp")
        unfinished.write_bytes(type_adapter(_Sign).dump_json(sign))
        unfinished.replace(self._path(self.me.id))
        # `Path.glob` would return an empty list for a folder that cannot be read.
        listed = {Path(name).stem for name in os.listdir(self._folder) if name.endswith(".json")}
        self._clock += pause
        for id in (listed | self._sightings.keys()) - {self.me.id}:
            self._look_at(id)

    def _look_at(self, id: str) -> None:
        """Read the file of another launcher. Opening the file asks the server; a listing may come from a cache."""
        now = self.now()
        try:
            sign = type_adapter(_Sign).validate_json(self._path(id).read_bytes())
        except FileNotFoundError:
            with self._lock:
                self._sightings.pop(id, None)
            return
        except (OSError, ValidationError):
            return  # no news
        with self._lock:
            sighting = self._sightings.get(id)
            if sighting is None:
                self._sightings[id] = _Sighting(sign.member, sign.beat, now, now)
            elif sign.beat != sighting.beat:
                sighting.beat, sighting.alive_at = sign.beat, now
                if sign.reaches == self.me.id:
                    sighting.reached_at = now

    def _is_over(self, last: float) -> bool:
        return self.now() - last > self._timeout

    def now(self) -> float:
        """Return the seconds for which this launcher has used the folder."""
        return self._clock + self._since_beat()

    def _since_beat(self) -> float:
        return min(time.monotonic() - self._began, _MOST_SECONDS)

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"


@dataclass(frozen=True)
class Generation:
    """One start of the ranks.

    Attributes:
        number: Counts the generations of a run from 1.
        members: The launchers that start ranks, in the order of their nodes. The first one leads.
        port: Port of the first node at which the torchruns of all nodes meet.
        flags: The flags of the ranks.
    """

    number: int
    members: tuple[Member, ...]
    port: int
    flags: Flags

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return sum(member.ranks for member in self.members)

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port at which the torchruns meet."""
        return self.members[0].address, self.port


class Generations:
    """The files of a run's generations, in a folder that all nodes see.

    A generation, once written, never changes. How it ended is in a file beside it.

    Args:
        folder: The folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest_number(self) -> int:
        """Return the number of the newest generation; 0 if there is none.

        Raises:
            OSError: The folder cannot be listed.
        """
        # `Path.glob` would find nothing in a folder that cannot be read.
        names = (_GENERATION_FILE.fullmatch(name) for name in os.listdir(self._folder))
        return max((int(name["number"]) for name in names if name), default=0)

    def newest(self) -> Generation | None:
        """Return the newest generation; None if there is none.

        Raises:
            RunFailure: Its file is damaged.
            OSError: The folder or the file cannot be read.
        """
        path = self._path(self.newest_number())
        if path == self._path(0):
            return None
        try:
            return type_adapter(Generation).validate_json(path.read_bytes())
        except ValidationError as error:
            raise RunFailure(
                f"{path} is damaged: stop the launchers of all nodes, remove {self._folder}, and start the run again"
            ) from error

    def write(self, generation: Generation) -> bool:
        """Write a generation; return False if another launcher has written one with this number.

        Raises:
            OSError: The file cannot be written.
        """
        # A link, unlike a renamed file, never replaces a file. Network file systems make links atomically, too.
        unfinished = self._folder / f".{uuid.uuid4().hex}.tmp"
        unfinished.write_bytes(type_adapter(Generation).dump_json(generation))
        try:
            os.link(unfinished, self._path(generation.number))
        except FileExistsError:
            return False
        finally:
            unfinished.unlink()
        return True

    def end(self, number: int, exit_code: int) -> None:
        """Record that the run ends with a generation, for all launchers."""
        with suppress(OSError, UserError):
            write_text(self._end_path(number), str(exit_code))

    def exit_code(self, number: int) -> int | None:
        """Return the exit code with which the run ended in a generation; None if the run continues.

        Raises:
            OSError: The file cannot be read.
        """
        with suppress(FileNotFoundError):
            return int(self._end_path(number).read_text())
        return None

    def leave_file(self, number: int) -> Path:
        """Return the file that asks the ranks of a generation to end after their next checkpoint."""
        return self._folder / f"leave-{number:06d}"

    def _path(self, number: int) -> Path:
        return self._folder / f"generation-{number:06d}.json"

    def _end_path(self, number: int) -> Path:
        return self._folder / f"end-{number:06d}"


def leading_member(newest: Generation | None, known: Sequence[Member]) -> Member:
    """Return the launcher that leads.

    The first member of the running generation leads as long as it is there; then its next member does. A launcher that
    has just come never takes over from one that trains.

    Args:
        newest: The generation that runs; None if none runs.
        known: All launchers that are not gone, the oldest first; not empty.
    """
    members = newest.members if newest is not None else ()
    return next((member for member in members if member in known), known[0])
