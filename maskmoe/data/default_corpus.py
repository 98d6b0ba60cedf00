"""Real text that every machine has: sources and documentation of the installed Python and its packages."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings"}  # encodings: generated tables
_MIN_BYTES, _MAX_BYTES = 256, 1 << 20
_MAX_LINE_BYTES = 1000  # longer lines mean generated code or data


@dataclass(frozen=True)
class CorpusDocument:
    """A text file: its path relative to the library folder it was found in, and its content."""

    path: str
    text: str


def default_corpus(limit_bytes: int) -> Iterator[CorpusDocument]:
    """Files of the standard library, then of the installed packages, in the order of their paths, each content once.

    Left out are files that are not UTF-8, tiny, larger than 1 MiB, or hold very long lines.

    Args:
        limit_bytes: stop before the documents together exceed this many bytes of text.
    """
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    seen: set[bytes] = set()
    size = 0
    for root in roots:
        for path in _text_files(root):
            data = _read_text(path)
            digest = hashlib.sha256(data).digest()
            if not data or digest in seen:
                continue
            seen.add(digest)
            size += len(data)
            if size > limit_bytes:
                return
            yield CorpusDocument(path.relative_to(root).as_posix(), data.decode("utf-8"))


def _text_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in root.walk():
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        yield from (folder / name for name in sorted(names) if Path(name).suffix in _SUFFIXES)


def _read_text(path: Path) -> bytes:
    """Content of the file, or nothing where it is not text written by people."""
    try:
        if not _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
            return b""
        data = path.read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return data if max(map(len, data.split(b"\n"))) <= _MAX_LINE_BYTES else b""
