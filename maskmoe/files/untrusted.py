"""Reads files that may come from a stranger: of bounded size, inside their folder, and never a device or a pipe."""

import os
import stat
from functools import cache
from io import BufferedReader
from pathlib import Path

from pydantic import TypeAdapter
from pydantic_core import from_json

from maskmoe.errors import UserError

MAX_JSON_BYTES = 64 << 20
"""Upper bound of a JSON file and of a tokenizer. The largest known files, also indices of weights, have 35 MB."""

_HUB_BLOBS, _HUB_SNAPSHOTS = "blobs", "snapshots"


class UnusableFile(UserError):  # noqa: N818 (a finding about a file)
    """A file that cannot be used, with a reason that follows its path, such as "is not a regular file"."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.reason = reason


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading. Raises UnusableFile for all others, and if the file cannot be read."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise UnusableFile(path, "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise UnusableFile(path, "does not exist") from error
    except (OSError, ValueError) as error:
        raise UnusableFile(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a file that a library will open by its name is a regular file. Raises UnusableFile."""
    open_regular(path).close()


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a regular file. Raises UnusableFile if it cannot be read, or has more than `max_bytes` bytes."""
    path = Path(path)
    with open_regular(path) as stream:
        try:
            content = stream.read(max_bytes + 1)
        except OSError as error:
            raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise UnusableFile(path, f"has more than the {max_bytes:,} bytes that such a file may have")
    return content


def read_json_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a JSON file and return its bytes, which every JSON parser can then handle.

    Raises:
        UnusableFile: The file cannot be read, is not JSON, is nested too deeply, or has a number of thousands of
            digits.
    """
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        repr(from_json(content))  # reading limits the depth, printing the digits of a number
    except ValueError as error:
        raise UnusableFile(Path(path), f"is damaged (Invalid JSON: {' '.join(str(error).split())})") from error
    return content


@cache
def type_adapter[T](kind: type[T]) -> TypeAdapter[T]:
    """Return the adapter of a type. A process makes each adapter once, because making one takes milliseconds."""
    return TypeAdapter(kind)


def check_name(folder: Path, name: str) -> None:
    """Check that a name, which need not exist yet, stays inside a folder, see `resolve_inside`. Raises UnusableFile."""
    parts = name.split("/")
    if not name.isprintable() or any(part in ("", "..") for part in parts):
        raise UnusableFile(folder, f"names the file {name[:200]!r}, which does not lie inside the folder")


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file that a file of the same folder names.

    A name must not be absolute or contain `..`. The file may be a link to another file of the folder, or to the `blobs`
    of a cache of the Hugging Face Hub if the folder is a snapshot of that cache or lies in one. The folder itself,
    which the user named, may be a link to anywhere.

    Raises:
        UnusableFile: The name leads outside the folder, or does not name a regular file.
    """
    check_name(folder, name)
    path = folder / name
    check_regular(path)
    found, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    snapshots = (place for place in root.parents if place.name == _HUB_SNAPSHOTS)
    allowed = [root, *(place.parent / _HUB_BLOBS for place in snapshots)]
    if not any(found.is_relative_to(place) for place in allowed):
        raise UnusableFile(path, "is a link to a file outside its folder; copy the file into the folder")
    return path
