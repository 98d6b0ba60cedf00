"""Read documents from text files: JSON lines or plain text, uncompressed or compressed with gzip or zstd.

Reading has two steps, so that a single reader can feed many parsing processes. `read_blocks` cuts files into blocks of
raw bytes that end at the end of a document. `parse_block` turns one block into documents.

A JSON line is one document, whatever its size. A plain text file is one document if it has up to about 1 MiB
(`DOCUMENT_BYTES`); a larger file is divided at line ends into documents of about 1 MiB.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Buffer, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from maskmoe.errors import UserError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
DOCUMENT_BYTES = 1 << 20
"""Size in bytes beyond which a plain text file is divided into several documents."""
BLOCK_BYTES = 1 << 18
"""Size in bytes at which a block of JSON lines ends, after the line that reaches it."""


@dataclass(frozen=True)
class Block:
    """Raw bytes of whole documents.

    Attributes:
        path: The file that the bytes were read from.
        is_json: Whether `data` holds JSON lines, one document a line. Otherwise `data` is one document of plain text.
        data: The uncompressed bytes.
        first_line: Number of the first line in the file, counted from 1.
        offset: Position of the first byte in the uncompressed file.
        file_bytes: Bytes read from the file on disk, compressed or not, to get this block. A progress bar adds them up.
    """

    path: str
    is_json: bool
    data: bytes
    first_line: int
    offset: int
    file_bytes: int


def read_blocks(paths: Sequence[str | Path]) -> Iterator[Block]:
    """Yield the blocks of all files in order; only one block is in memory at a time.

    Raises:
        UserError: A file does not exist, cannot be read, or holds damaged compressed data.
    """
    for path in check_inputs(paths):
        yield from _read_file(path)


def check_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """Return the paths as `Path` objects after checking that each one is a file.

    Raises:
        UserError: A path does not exist or is a folder.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"input {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    return [Path(path) for path in paths]


def _read_file(path: Path) -> Iterator[Block]:
    suffix = Path(path.stem).suffix if path.suffix in _DECOMPRESSORS else path.suffix
    is_json = suffix.lower() in JSON_SUFFIXES
    block_bytes = BLOCK_BYTES if is_json else DOCUMENT_BYTES
    line, offset, position = 1, 0, 0
    try:
        with open(path, "rb") as raw, _DECOMPRESSORS.get(path.suffix, _keep_uncompressed)(raw) as stream:
            while lines := stream.readlines(block_bytes):
                data, previous, position = b"".join(lines), position, raw.tell()
                yield Block(str(path), is_json, data, line, offset, position - previous)
                line, offset = line + len(lines), offset + len(data)
    except (EOFError, zlib.error, gzip.BadGzipFile, _zstd_error()) as error:
        raise UserError(f"input {path} is damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror or error}") from error


def parse_block(block: Block, json_keys: Sequence[str]) -> list[list[str]]:
    """Return the documents of a block: one list for each key, all of the same length.

    A block of plain text gives the same document for every key. Empty lines between JSON lines are skipped.

    Args:
        block: The bytes to parse.
        json_keys: Keys of a JSON line whose values are text.

    Raises:
        UserError: The block has invalid UTF-8 or JSON, lacks a key, or has a value that is not text. The message names
            the file and the line.
    """
    # The byte order mark at the start of a file is not part of its text.
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


def _parse_line(line: str, json_keys: Sequence[str], location: str) -> list[str]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: invalid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f'{location}: expected a JSON object such as {{"{json_keys[0]}": "…"}}')
    texts = []
    for key in json_keys:
        if key not in values:
            raise UserError(f"{location}: no key {key!r}; choose the keys that hold the text with --json-keys")
        text = values[key]
        if not isinstance(text, str):
            raise UserError(f"{location}: the value of {key!r} is not text")
        # Only an escape can produce half of a surrogate pair, so the slow check is rarely needed.
        if "\\u" in line and not _is_encodable(text):
            raise UserError(f"{location}: the value of {key!r} has half of a surrogate pair, which is not text")
        texts.append(text)
    return texts


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_documents(paths: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """Yield all documents of all files in order.

    Args:
        paths: The text files.
        json_key: Key of a JSON line whose value is the document.

    Raises:
        UserError: A file cannot be read or parsed, see `read_blocks` and `parse_block`.
    """
    for block in read_blocks(paths):
        yield from parse_block(block, [json_key])[0]


def _zstd_error() -> type[Exception]:
    import zstandard  # imported late: most inputs need no zstd

    return zstandard.ZstdError


class _ZstdReader(io.RawIOBase):
    """Decompress a file of zstd frames and raise an error if the file is truncated.

    The reader of the `zstandard` library ends silently in the middle of a truncated frame.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: ZstdDecompressionObj | None = None
        self._compressed = self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        # Decompress until there is output; some input bytes, such as frame headers, give none.
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
        # Hand out as much as the caller has room for and keep the remaining bytes for the next call.
        target = memoryview(buffer)
        chunk = self._decompressed[: len(target)]
        self._decompressed = self._decompressed[len(chunk) :]
        target[: len(chunk)] = chunk
        return len(chunk)


def _keep_uncompressed(raw: BinaryIO) -> BinaryIO:
    return raw


def _decompress_gzip(raw: BinaryIO) -> BinaryIO:
    return cast("BinaryIO", gzip.GzipFile(fileobj=raw))


def _decompress_zstd(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_ZstdReader(raw), 1 << 20)


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": _decompress_gzip, ".zst": _decompress_zstd}
