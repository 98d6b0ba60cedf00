"""Read files out of wheels without installing or extracting them.

A wheel is accepted only if its sha256 is the expected one. Its members are read into memory, within limits.
"""

import fnmatch
import hashlib
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskmoe.files.untrusted import UnusableFile, check_name, read_bounded

_MAX_WHEEL_BYTES = 256 << 20
_MAX_MEMBERS = 100_000
_MAX_MEMBER_BYTES = 128 << 20
_MAX_TEXT_BYTES = 512 << 20
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_IS_ENCRYPTED = 1


def read_wheel(path: Path, sha256: str) -> bytes:
    """Return the content of a wheel.

    Args:
        path: the wheel.
        sha256: the expected sha256, in hexadecimal digits.

    Raises:
        UnusableFile: the file cannot be read, or has another sha256.
    """
    content = read_bounded(path, _MAX_WHEEL_BYTES)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UnusableFile(path, f"is another file: its sha256 is {found}, not {sha256}")
    return content


def read_members(path: Path, content: bytes, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of the files of a wheel whose names match a pattern, in the order of their names.

    Args:
        path: path of the wheel, for errors.
        content: content of the wheel.
        patterns: patterns of names; `*` also matches `/`.

    Raises:
        UnusableFile: the wheel is damaged, has a member whose name leads outside the wheel, a matching member is a link
            or too large, or no member matches.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            for member in _select(path, wheel.infolist(), patterns):
                with wheel.open(member) as stream:
                    yield member.filename, stream.read(_MAX_MEMBER_BYTES)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise UnusableFile(path, f"is damaged: {error or type(error).__name__}") from error


def _select(path: Path, members: Sequence[zipfile.ZipInfo], patterns: Sequence[str]) -> list[zipfile.ZipInfo]:
    """Return the matching members of a wheel by name, after a check of all members."""
    if len(members) > _MAX_MEMBERS:
        raise UnusableFile(path, f"has more than {_MAX_MEMBERS:,} members")
    for member in members:
        check_name(path, member.filename.removesuffix("/"))
    matching = [
        member
        for member in sorted(members, key=lambda member: member.filename)
        if not member.is_dir() and any(fnmatch.fnmatchcase(member.filename, pattern) for pattern in patterns)
    ]
    if not matching:
        raise UnusableFile(path, f"has no file that matches {' or '.join(patterns)}")
    for member in matching:
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UnusableFile(path, f"holds the link {member.filename}; only files are read")
        if member.flag_bits & _IS_ENCRYPTED or member.compress_type not in _COMPRESSIONS:
            raise UnusableFile(path, f"holds {member.filename}, which is encrypted or compressed in an unusual way")
        if member.file_size > _MAX_MEMBER_BYTES:
            raise UnusableFile(path, f"holds {member.filename} of more than {_MAX_MEMBER_BYTES >> 20} MiB")
    if sum(member.file_size for member in matching) > _MAX_TEXT_BYTES:
        raise UnusableFile(path, f"holds more than {_MAX_TEXT_BYTES >> 20} MiB of matching files")
    return matching
