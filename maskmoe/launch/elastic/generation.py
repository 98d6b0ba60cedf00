"""The generations of an elastic run: each says which nodes train with which flags, until the next one begins."""

import os
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from maskmoe.errors import RunFailure, UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.launch.elastic.membership import Member
from maskmoe.launch.model_file import Flags

_NAME = re.compile(r"generation-(?P<number>[0-9]+)\.json")


@dataclass(frozen=True)
class Generation:
    """One start of the ranks.

    Attributes:
        number: counts the generations of a run from 1.
        members: the launchers that start ranks, in the order of their nodes. The first one leads.
        port: port of the first node at which the torchruns of all nodes meet.
        flags: the flags of the ranks.
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


_GENERATION = TypeAdapter(Generation)


class Generations:
    """The files of a run's generations, in a folder that all nodes see.

    A generation, once written, never changes. How it ended is in a file beside it.

    Args:
        folder: the folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest_number(self) -> int:
        """Return the number of the newest generation; 0 if there is none.

        Raises:
            OSError: the folder cannot be listed.
        """
        # `Path.glob` would find nothing in a folder that cannot be read.
        names = (_NAME.fullmatch(name) for name in os.listdir(self._folder))
        return max((int(name["number"]) for name in names if name), default=0)

    def newest(self) -> Generation | None:
        """Return the newest generation; None if there is none.

        Raises:
            RunFailure: its file is damaged.
            OSError: the folder or the file cannot be read.
        """
        path = self._path(self.newest_number())
        if path == self._path(0):
            return None
        try:
            return _GENERATION.validate_json(path.read_bytes())
        except ValidationError as error:
            raise RunFailure(
                f"{path} is damaged: stop the launchers of all nodes, remove {self._folder}, and start the run again"
            ) from error

    def write(self, generation: Generation) -> bool:
        """Write a generation; return False if another launcher has written one with this number.

        Raises:
            OSError: the file cannot be written.
        """
        # A link, unlike a renamed file, never replaces a file. Network file systems make links atomically, too.
        unfinished = self._folder / f".{uuid.uuid4().hex}.tmp"
        unfinished.write_bytes(_GENERATION.dump_json(generation))
        try:
            os.link(unfinished, self._path(generation.number))
        except FileExistsError:
            return False
        finally:
            unfinished.unlink()
        return True

    def end(self, number: int, exit_code: int) -> None:
        """Record that the run ends with a generation, for all launchers."""
        with suppress(OSError, UserError), atomic_output(self._end_path(number)) as path:
            path.write_text(str(exit_code))

    def exit_code(self, number: int) -> int | None:
        """Return the exit code with which the run ended in a generation; None if the run continues.

        Raises:
            OSError: the file cannot be read.
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
        newest: the generation that runs; None if none runs.
        known: all launchers that are not gone, the oldest first; not empty.
    """
    members = newest.members if newest is not None else ()
    return next((member for member in members if member in known), known[0])
