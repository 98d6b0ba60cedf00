"""Read JSON lines and plain text, compressed or not, in blocks of whole documents.

A JSON line is one document, whatever its size. Plain text is divided at a separator if one is given. Otherwise a plain
text file is one document if it has up to about 1 MiB (`DOCUMENT_BYTES`), and a larger file is divided at line ends into
documents of about 1 MiB.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import zstandard

from maskmoe.data.inputs import Input, compression_of_name
from maskmoe.errors import UserError
from maskmoe.files.untrusted import refuse_surrogates

DOCUMENT_BYTES = 1 << 20
"""Size in bytes beyond which a plain text file is divided into several documents."""
BLOCK_BYTES = 1 << 18
"""Size in bytes at which a block of JSON lines ends, after the line that exceeds it."""
_CHUNK_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ZSTD_WINDOW_BYTES = 1 << 31  # the largest window, of `zstd --long=31`
# Both libraries' objects have `decompress`, `eof` and `unused_data`.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(),
}


@dataclass(frozen=True)
class TextBlock:
    """Raw bytes of whole documents.

    Attributes:
        source: The input that the block comes from.
        data: The uncompressed bytes.
        first_line: Number of the first line, counted from 1 at the start of the input.
    """

    source: Input
    data: bytes
    first_line: int

    @property
    def num_bytes(self) -> int:
        """Size of the block in bytes."""
        return len(self.data)

    def documents(self, json_keys: Sequence[str]) -> list[list[str]]:
        """Parse the block and return its documents: one list for each key, all of the same length.

        Plain text gives the same documents for every key. Empty lines between JSON lines, and documents of white space
        between separators, are skipped.

        Raises:
            UserError: The block has invalid UTF-8 or JSON, lacks a key, or has a value that is not text.
        """
        try:
            text = self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.first_line + self.data.count(b"\n", 0, error.start)
            raise UserError(f"{self._place(line)}: invalid UTF-8 ({error.reason})") from error
        if self.source.format == "text":
            texts = [text]
            if self.source.separator is not None:
                parts = text.split(self.source.separator.decode())
                texts = [part for part in parts if part and not part.isspace()]
            return [texts for _ in json_keys]
        lines = enumerate(text.split("\n"), self.first_line)
        rows = [self._parse_line(number, line, json_keys) for number, line in lines if line and not line.isspace()]
        return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in json_keys]

    def _parse_line(self, number: int, line: str, json_keys: Sequence[str]) -> list[str]:
        """Return the texts under the keys of a JSON line."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; --input-format text reads plain text" if number == 1 else ""
            raise UserError(f"{self._place(number)}: invalid JSON ({error}){hint}") from error
        if not isinstance(values, dict):
            raise UserError(f'{self._place(number)}: expected a JSON object such as {{"{json_keys[0]}": "…"}}')
        texts = []
        for key in json_keys:
            if key not in values:
                raise UserError(f"{self._place(number)}: no key {key!r}; choose the keys of the text with --json-keys")
            text = values[key]
            if not isinstance(text, str):
                raise UserError(f"{self._place(number)}: the value of {key!r} is not text")
            # Only an escape can produce half of a surrogate pair, so the slow check is rarely needed.
            if "\\u" in line:
                refuse_surrogates(text, f"{self._place(number)}: the value of {key!r}")
            texts.append(text)
        return texts

    def _place(self, line: int) -> str:
        """Return the place of a line for people."""
        return f"{self.source.name}: line {line}"


def read_text(source: Input, advance: Callable[[int], object]) -> Iterator[TextBlock]:
    """Yield the blocks of a text file or a pipe.

    Args:
        source: JSON lines or plain text.
        advance: Takes the number of bytes that were read from the disk since the last call.

    Raises:
        UserError: The file cannot be read, or its compression is damaged.
    """
    one_document = source.format == "text" and source.separator is None
    size = DOCUMENT_BYTES if one_document else BLOCK_BYTES
    line = 1
    try:
        with source.open() as stream:
            compression = _find_compression(source, stream)
            chunks = _read_chunks(stream, advance)
            if compression is not None:
                chunks = _decompress(chunks, _DECOMPRESSORS[compression])
            for number, data in enumerate(_cut_after(chunks, source.separator or b"\n", size)):
                yield TextBlock(source, data.removeprefix(_BYTE_ORDER_MARK) if number == 0 else data, line)
                line += data.count(b"\n")
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"input {source.name} is damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"input {source.name} cannot be read: {error.strerror or error}") from error


def _find_compression(source: Input, stream: BufferedReader) -> str | None:
    """Return the compression of a file, by its suffix or else by its first bytes; None if it is not compressed.

    Args:
        source: The input.
        stream: The open file at its start, which does not advance.
    """
    first_bytes = stream.peek(4)[:4]
    # No text in UTF-8 starts like this.
    by_content = "gzip" if first_bytes[:2] == b"\x1f\x8b" else "zstd" if first_bytes == b"\x28\xb5\x2f\xfd" else None
    return compression_of_name(source.path) or by_content


def _read_chunks(stream: BufferedReader, advance: Callable[[int], object]) -> Iterator[bytes]:
    """Yield the bytes of a file."""
    while chunk := stream.read1(_CHUNK_BYTES):
        advance(len(chunk))
        yield chunk


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


def _cut_after(chunks: Iterable[bytes], delimiter: bytes, size: int) -> Iterator[bytes]:
    """Join the chunks, and cut the result after each delimiter that makes a block larger than `size` bytes.

    Delimiters are found from left to right, as by `bytes.split`: they do not overlap.
    """
    # The end of some delimiters is the start of another one, as in "\n\n\n": search for these from the block's start.
    overlaps = any(delimiter.endswith(delimiter[:length]) for length in range(1, len(delimiter)))
    start = 0 if overlaps else max(0, size - len(delimiter) + 1)
    block, searched = bytearray(), start
    for chunk in chunks:
        block += chunk
        while (found := block.find(delimiter, searched)) >= 0:
            searched = found + len(delimiter)
            if searched > size:
                yield bytes(block[:searched])
                del block[:searched]
                searched = start
        searched = max(searched, len(block) - len(delimiter) + 1)
    if block:
        yield bytes(block)
