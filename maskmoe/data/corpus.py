"""Read documents from text: JSON lines, plain text, Parquet and Arrow files, pipes and saved datasets.

Reading has two steps, so that a single reader can feed many parsing processes. `read_blocks` cuts inputs into blocks of
raw bytes that hold whole documents. `parse_block` turns one block into documents.

A JSON line or a row of a table is one document, whatever its size. Plain text is divided at a separator if one is
given. Otherwise a plain text file is one document if it has up to about 1 MiB (`DOCUMENT_BYTES`), and a larger file is
divided at line ends into documents of about 1 MiB. JSON lines and plain text may be compressed with gzip or zstd.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from maskmoe.data.arrow_files import RowBlock, parse_rows, read_arrow, read_parquet
from maskmoe.data.inputs import Input, compression_of_name, find_inputs
from maskmoe.errors import UserError
from maskmoe.files.surrogates import refuse_surrogates

DOCUMENT_BYTES = 1 << 20
"""Size in bytes beyond which a plain text file is divided into several documents."""
BLOCK_BYTES = 1 << 18
"""Size in bytes at which a block of JSON lines ends, after the line that exceeds it."""
_CHUNK_BYTES = 1 << 16
_ZSTD_WINDOW_BYTES = 1 << 31  # the largest window, of `zstd --long=31`


@dataclass(frozen=True)
class TextBlock:
    """Raw bytes of whole documents.

    Attributes:
        name: Name of the input for people.
        is_json: Whether `data` holds JSON lines, one document a line. Otherwise `data` is plain text.
        data: The uncompressed bytes.
        first_line: Number of the first line, counted from 1.
        offset: Position of the first byte in the uncompressed file.
        file_bytes: Bytes read from the file on disk, compressed or not, to get this block. A progress bar adds them up.
        separator: Bytes that end a document of plain text; None if `data` is one document.
        lines_from: Position of the byte from which lines are counted: 0, or the start of the part that is read.
    """

    name: str
    is_json: bool
    data: bytes
    first_line: int
    offset: int
    file_bytes: int
    separator: bytes | None = None
    lines_from: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of the block in bytes."""
        return len(self.data)

    def place(self, line: int) -> str:
        """Return the place of a line for people."""
        after = f" after byte {self.lines_from}" if self.lines_from else ""
        return f"{self.name}: line {line}{after}"


Block = TextBlock | RowBlock


def read_blocks(
    inputs: Sequence[Input], json_keys: Sequence[str] = ("text",), bar: tqdm | None = None
) -> Iterator[Block]:
    """Yield the blocks of all inputs in order; only one block is in memory at a time.

    Args:
        inputs: The inputs, see `find_inputs`.
        json_keys: Names of the columns to read from Parquet and Arrow files.
        bar: A progress bar to advance, see `progress_bar`.

    Raises:
        UserError: A file cannot be read, is damaged, or lacks a column of text.
    """
    for source in inputs:
        if source.format == "parquet":
            blocks = read_parquet(source, json_keys)
        elif source.format == "arrow":
            blocks = read_arrow(source, json_keys)
        else:
            blocks = _read_text(source)
        for block in blocks:
            if bar is not None:
                bar.update(block.file_bytes)
            yield block


def progress_bar(inputs: Sequence[Input], description: str) -> tqdm:
    """Return a progress bar over the bytes of all inputs on disk, which is shown if stderr is a terminal.

    The bar has no end if the size of an input is unknown.
    """
    sizes = [source.num_bytes for source in inputs]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None)


def _read_text(source: Input) -> Iterator[TextBlock]:
    is_json = source.format == "jsonl"
    try:
        with source.open() as stream:
            start, end = (0, None) if source.part is None else document_range(stream, source)
            file = _Chunks(stream, start, end)
            chunks = _decompress(file, decompressor) if (decompressor := _decompressor(source, file)) else iter(file)
            if source.separator is not None:
                pieces = _cut_at_separators(chunks, source.separator, BLOCK_BYTES)
            else:
                pieces = _cut_at_line_ends(chunks, BLOCK_BYTES if is_json else DOCUMENT_BYTES)
            line, offset = 1, start
            for data in pieces:
                yield TextBlock(
                    source.name, is_json, data, line, offset, file.take_count(), source.separator, lines_from=start
                )
                line, offset = line + data.count(b"\n"), offset + len(data)
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"input {source.name} is damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"input {source.name} cannot be read: {error.strerror or error}") from error


class _Chunks:
    """Reads a range of a file in chunks, and counts the bytes.

    Args:
        file: The open file, which may be a pipe if the range is the whole file.
        start: Position of the first byte.
        end: Position after the last byte, or None for the end of the file.
    """

    def __init__(self, file: BufferedReader, start: int, end: int | None) -> None:
        if end is not None:
            file.seek(start)
        self._file, self._num_left = file, None if end is None else end - start
        self._count, self._head = 0, b""

    def __iter__(self) -> Iterator[bytes]:
        if self._head:
            yield self._head
        while chunk := self._read(_CHUNK_BYTES):
            yield chunk

    def head(self) -> bytes:
        """Return up to 4 of the first bytes, which stay part of the chunks."""
        while len(self._head) < 4 and (read := self._read(4 - len(self._head))):
            self._head += read
        return self._head

    def _read(self, size: int) -> bytes:
        read = self._file.read1(size if self._num_left is None else min(size, self._num_left))
        self._num_left = None if self._num_left is None else self._num_left - len(read)
        self._count += len(read)
        return read

    def take_count(self) -> int:
        """Return the number of bytes that were read since the last call."""
        count, self._count = self._count, 0
        return count


def document_range(file: BufferedReader, source: Input) -> tuple[int, int]:
    """Return the positions of the first document that starts in a part of a file, and of the first one after the part.

    Args:
        file: The open file.
        source: JSON lines, or plain text with a separator that cannot overlap itself; `part` is a range of bytes.
    """
    delimiter = source.separator or b"\n"
    part = source.part or range(0)
    return _next_document(file, part.start, delimiter), _next_document(file, part.stop, delimiter)


def _next_document(file: BufferedReader, position: int, delimiter: bytes) -> int:
    """Return the start of the first document that starts at `position` or later, or the file's end."""
    if position == 0:
        return 0
    # Find the first delimiter that ends at `position` or later. `position` becomes the position of `data` in the file.
    position = max(0, position - len(delimiter))
    file.seek(position)
    data = b""
    while chunk := file.read(_CHUNK_BYTES):
        data += chunk
        if (found := data.find(delimiter)) >= 0:
            return position + found + len(delimiter)
        kept = min(len(data), len(delimiter) - 1)
        position += len(data) - kept
        data = data[len(data) - kept :]
    return position + len(data)


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


def _cut_at_separators(chunks: Iterable[bytes], separator: bytes, size: int) -> Iterator[bytes]:
    """Join the chunks, and cut the result after each separator that makes a block larger than `size` bytes.

    Separators are found from left to right, as by `bytes.split`: they do not overlap.
    """
    block = bytearray()
    searched = 0
    for chunk in chunks:
        block += chunk
        while (found := block.find(separator, searched)) >= 0:
            searched = found + len(separator)
            if searched > size:
                yield bytes(block[:searched])
                del block[:searched]
                searched = 0
        searched = max(searched, len(block) - len(separator) + 1)
    if block:
        yield bytes(block)


# Both libraries' objects have `decompress`, `eof` and `unused_data`.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(),
}
# No text in UTF-8 starts like this.
_COMPRESSION_OF_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def _decompressor(source: Input, file: _Chunks) -> Callable[[], Any] | None:
    """Return the decompressor of a file by its suffix or else by its first bytes; None if it is not compressed."""
    compression = compression_of_name(source.path) or _compression_of_content(file.head())
    return _DECOMPRESSORS[compression] if compression else None


def _compression_of_content(first_bytes: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSION_OF_MAGIC.items() if first_bytes.startswith(magic)), None)


def is_compressed(path: str) -> bool:
    """Return whether a file is compressed with gzip or zstd, by its suffix or its first bytes."""
    with open(path, "rb") as file:
        return (compression_of_name(path) or _compression_of_content(file.read(4))) is not None


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

    A block of plain text gives the same documents for every key. Empty lines between JSON lines, and documents of white
    space between separators, are skipped.

    Args:
        block: The bytes to parse.
        json_keys: Keys of a JSON line, or names of columns, whose values are text.

    Raises:
        UserError: The block has invalid UTF-8 or JSON, lacks a key, or has a value that is not text. The message names
            the file and the line or row.
    """
    if isinstance(block, RowBlock):
        return parse_rows(block, json_keys)
    try:
        text = block.data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = block.offset + error.start
        line = block.first_line + block.data.count(b"\n", 0, error.start)
        raise UserError(f"{block.place(line)}: invalid UTF-8 at byte {offset} ({error.reason})") from error
    # The byte order mark at the start of a file is not part of its text.
    text = text.removeprefix("\ufeff") if block.offset == 0 else text
    if not block.is_json:
        texts = [text]
        if block.separator is not None:
            texts = [part for part in text.split(block.separator.decode()) if part and not part.isspace()]
        return [texts for _ in json_keys]
    lines = ((number, line) for number, line in enumerate(text.split("\n"), block.first_line) if line.strip())
    documents = [_parse_line(line, json_keys, block.place(number)) for number, line in lines]
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
            raise UserError(f"{location}: no key {key!r}; choose the keys of the text with --json-keys or --json-key")
        text = values[key]
        if not isinstance(text, str):
            raise UserError(f"{location}: the value of {key!r} is not text")
        # Only an escape can produce half of a surrogate pair, so the slow check is rarely needed.
        if "\\u" in line:
            refuse_surrogates(text, f"{location}: the value of {key!r}")
        texts.append(text)
    return texts


def read_documents(paths: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """Yield all documents of all inputs in order.

    Args:
        paths: The inputs, see `find_inputs`.
        json_key: Key of a JSON line, or name of a column, whose value is the document.

    Raises:
        UserError: An input cannot be read or parsed, see `read_blocks` and `parse_block`.
    """
    for block in read_blocks(find_inputs(paths), [json_key]):
        yield from parse_block(block, [json_key])[0]
