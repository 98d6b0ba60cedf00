"""Documents from text files: JSON lines and plain text, each plain or compressed with gzip or zstd.

Reading is in two steps, so that the first can feed many processes: `read_blocks` cuts files into blocks of raw bytes
that end where documents end, and `parse_block` turns one block into documents.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from maskmoe.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
DOCUMENT_BYTES = 1 << 20  # plain text files are one document up to about this size, several beyond it
BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Block:
    """Raw bytes of whole documents.

    Attributes:
        path: the file they are from.
        is_json: JSON lines, one document each; otherwise `data` is one document of plain text.
        data: uncompressed bytes.
        first_line: line number of the first line, from 1.
        offset: position of the first byte in the uncompressed file.
        file_bytes: bytes of the file, as it is on disk, that were read for this block; for progress.
    """

    path: str
    is_json: bool
    data: bytes
    first_line: int
    offset: int
    file_bytes: int


def read_blocks(paths: Sequence[str | Path]) -> Iterator[Block]:
    """All files' blocks in order, read one at a time.

    Raises:
        UserError: a file does not exist, cannot be read, or its compressed data is damaged.
    """
    for path in check_inputs(paths):
        yield from _read_file(path)


def check_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """The paths, if all of them are files. Raises UserError otherwise."""
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"input {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    return [Path(path) for path in paths]


def _read_file(path: Path) -> Iterator[Block]:
    suffix = Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix
    is_json = suffix.lower() in JSON_SUFFIXES
    block_bytes = BLOCK_BYTES if is_json else DOCUMENT_BYTES
    line, offset, position = 1, 0, 0
    try:
        with open(path, "rb") as raw, _OPENERS.get(path.suffix, _as_it_is)(raw) as stream:
            while lines := stream.readlines(block_bytes):
                data, previous, position = b"".join(lines), position, raw.tell()
                yield Block(str(path), is_json, data, line, offset, position - previous)
                line, offset = line + len(lines), offset + len(data)
    except (EOFError, zlib.error, gzip.BadGzipFile, _zstd_error()) as error:
        raise UserError(f"input {path} is damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror or error}") from error


def parse_block(block: Block, json_keys: Sequence[str]) -> list[list[str]]:
    """Documents of a block, one list a key, all equally long.

    Plain text is the document of every key. Empty lines among JSON lines are skipped.

    Raises:
        UserError: invalid UTF-8 or JSON, a missing key, or a value that is not text; with the file and the line.
    """
    data = block.data.removeprefix(codecs.BOM_UTF8) if block.offset == 0 else block.data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = block.offset + len(block.data) - len(data) + error.start
        line = block.first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{block.path}: line {line}: invalid UTF-8 at byte {offset} ({error.reason})") from error
    if not block.is_json:
        return [[text] for _ in json_keys]
    lines = ((number, line) for number, line in enumerate(text.split("\n"), block.first_line) if line.strip())
    documents = [_parse_line(line, json_keys, f"{block.path}: line {number}") for number, line in lines]
    return [list(column) for column in zip(*documents, strict=True)] or [[] for _ in json_keys]


def _parse_line(line: str, json_keys: Sequence[str], where: str) -> list[str]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"{json_keys[0]}": "…"}}')
    texts = []
    for key in json_keys:
        if key not in values:
            raise UserError(f"{where}: no key {key!r}; choose the keys that hold the text with --json-keys")
        text = values[key]
        if not isinstance(text, str):
            raise UserError(f"{where}: the value of {key!r} is not text")
        if "\\u" in line and not _is_encodable(text):
            raise UserError(f"{where}: the value of {key!r} has half of a surrogate pair, which is not text")
        texts.append(text)
    return texts


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_documents(paths: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """All documents of all files in order. Raises UserError as `read_blocks` and `parse_block`."""
    for block in read_blocks(paths):
        yield from parse_block(block, [json_key])[0]


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames; unlike the library's own reader, it notices a truncated file."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = None
        self._compressed = self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._raw.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._frame = self._frame or self._new_frame()
            self._decompressed = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        taken = self._decompressed[: len(buffer)]
        self._decompressed = self._decompressed[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _as_it_is(raw: BinaryIO) -> BinaryIO:
    return raw


_OPENERS = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": lambda raw: io.BufferedReader(_ZstdReader(raw), 1 << 20),
}
