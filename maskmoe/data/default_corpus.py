"""Collect text that needs no download: sources and documentation of the installed Python and its packages."""

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
_EDITABLE_FINDERS = "__editable__"  # setuptools writes them, and they name the folder of a checkout
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings"}  # encodings: generated tables
MIN_FILE_BYTES = 256
# A larger file would make up a large part of the held-out text, of which there are about 600 kB.
MAX_FILE_BYTES = 1 << 15
_MAX_LINE_BYTES = 1000  # longer lines mean generated code or data
_MAX_DIGIT_SHARE = 0.3
_TABLE_LINES = 200
_MAX_SAME_SHAPE_SHARE = 0.5
_SAMPLED_LINES = 256


def default_corpus(limit_bytes: int) -> Iterator[dict[str, str]]:
    """Yield text files of the standard library, then of the installed packages, in the order of their paths.

    Each file is yielded as its content, `text`, and its `path` relative to the library folder that holds the file.
    Each content is yielded once. Skipped are files that are not UTF-8, smaller than 256 bytes, larger than 32 KiB, or
    not written by people (see `is_written_by_people`), and the finders of packages that are installed in editable form.

    Args:
        limit_bytes: Stop before the documents together exceed this number of bytes.
    """
    paths = sysconfig.get_paths()
    seen: set[bytes] = set()
    size = 0
    for root in dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")):
        for path in _text_files(root):
            data = _read_text(path)
            digest = hashlib.sha256(data).digest()
            if not data or digest in seen:
                continue
            seen.add(digest)
            size += len(data)
            if size > limit_bytes:
                return
            yield {"text": data.decode("utf-8"), "path": path.relative_to(root).as_posix()}


def is_written_by_people(data: bytes) -> bool:
    """Return whether `data` looks like prose or source code, not like numbers or a generated table.

    `data` is taken for numbers or a table if at least one of these holds:

    - A line has more than 1,000 bytes.
    - More than 30 % of the characters other than white space are digits.
    - There are at least 200 lines that are not empty, and more than half of them have the same shape: the same
      punctuation around words and numbers of any length. At most about 500 lines, spread evenly over the file, are
      compared.
    """
    lines = data.split(b"\n")
    if max(map(len, lines)) > _MAX_LINE_BYTES:
        return False
    num_visible = len(data.translate(None, b" \t\r\n\f\v"))
    num_digits = len(data) - len(data.translate(None, b"0123456789"))
    if num_digits > _MAX_DIGIT_SHARE * num_visible:
        return False
    lines = [line for line in lines if line.strip()]
    if len(lines) < _TABLE_LINES:
        return True
    sample = lines[:: max(1, len(lines) // _SAMPLED_LINES)]
    shapes = re.sub(rb"\w+", b"w", b"\n".join(sample)).translate(None, b" \t\r").split(b"\n")
    (_, num_alike), *_ = Counter(shapes).most_common(1)
    return num_alike <= _MAX_SAME_SHAPE_SHARE * len(shapes)


def _text_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in root.walk():
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            if Path(name).suffix in _SUFFIXES and not name.startswith(_EDITABLE_FINDERS):
                yield folder / name


def _read_text(path: Path) -> bytes:
    """Return the content of a file, or nothing if the file is unreadable or does not belong into the corpus."""
    try:
        if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            return b""
        data = path.read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return data if is_written_by_people(data) else b""
