"""Read documents from text files: JSON lines or plain text, uncompressed or compressed with gzip or zstd.

Reading has two steps, so that a single reader can feed many parsing processes. `read_blocks` cuts files into blocks of
raw bytes that end at the end of a document. `parse_block` turns one block into documents.

A JSON line is one document, whatever its size. A plain text file is one document if it has up to about 1 MiB
(`DOCUMENT_BYTES`); a larger file is divided at line ends into documents of about 1 MiB.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from maskmoe.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
DOCUMENT_BYTES = 1 << 20
"""Size in bytes beyond which a plain text file is divided into several documents."""
BLOCK_BYTES = 1 << 18
"""Size in bytes at which a block of JSON lines ends, after the line that exceeds it."""
_CHUNK_BYTES = 1 << 16
_HALF_OF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which UTF-8 cannot encode


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


def read_blocks(paths: Sequence[str | Path], bar: tqdm | None = None) -> Iterator[Block]:
    """Yield the blocks of all files in order; only one block is in memory at a time.

    Args:
        paths: The files.
        bar: A progress bar to advance, see `progress_bar`.

    Raises:
        UserError: A file does not exist, cannot be read, or holds damaged compressed data.
    """
    for path in check_inputs(paths):
        for block in _read_file(path):
            if bar is not None:
                bar.update(block.file_bytes)
            yield block


def progress_bar(paths: Sequence[Path], description: str) -> tqdm:
    """Return a progress bar over the bytes of all files on disk, which is shown if stderr is a terminal."""
    size = sum(path.stat().st_size for path in paths)
    return tqdm(total=size, unit="B", unit_scale=True, desc=description, disable=None)


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
    line, offset, position = 1, 0, 0
    try:
        with open(path, "rb") as file:
            chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
            if path.suffix in _DECOMPRESSORS:
                chunks = _decompress(chunks, _DECOMPRESSORS[path.suffix])
            for data in _cut_at_line_ends(chunks, BLOCK_BYTES if is_json else DOCUMENT_BYTES):
                previous, position = position, file.tell()
                yield Block(str(path), is_json, data, line, offset, position - previous)
                line, offset = line + data.count(b"\n"), offset + len(data)
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"input {path} is damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror or error}") from error


def _cut_at_line_ends(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Join the chunks, and cut the result after each line that makes a block larger than `size` bytes."""
    block = bytearray()
    for chunk in chunks:
        searched = max(size, len(block))
        block += chunk
        while end := block.find(b"\n", searched) + 1:
            yield bytes(block[:end])
            del block[:end]
            searched = size
    if block:
        yield bytes(block)


# Both libraries' objects have `decompress`, `eof` and `unused_data`.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def _decompress(chunks: Iterable[bytes], new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress gzip members or zstd frames that follow each other; raise EOFError if the last one is truncated."""
    decompressor = None
    for chunk in chunks:
        # Zeros may follow the end of a member.
        while chunk := chunk if decompressor else chunk.lstrip(b"\0"):
            decompressor = decompressor or new_decompressor()
            yield decompressor.decompress(chunk)
            chunk = decompressor.unused_data
            decompressor = None if decompressor.eof else decompressor
    if decompressor:
        raise EOFError("the compressed data has no end")


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
    try:
        text = block.data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = block.offset + error.start
        line = block.first_line + block.data.count(b"\n", 0, error.start)
        raise UserError(f"{block.path}: line {line}: invalid UTF-8 at byte {offset} ({error.reason})") from error
    # The byte order mark at the start of a file is not part of its text.
    text = text.removeprefix("\ufeff") if block.offset == 0 else text
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
        if "\\u" in line and _HALF_OF_PAIR.search(text):
            raise UserError(f"{location}: the value of {key!r} has half of a surrogate pair, which is not text")
        texts.append(text)
    return texts


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
