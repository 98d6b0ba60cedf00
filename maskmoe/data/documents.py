"""Read the documents of inputs: first blocks of whole documents, then the documents of each block.

A single process reads the blocks, and many processes can parse them into documents.

- A JSON line is one document of up to 1 GiB.
- Plain text is divided at a separator if one is given. Otherwise a plain text file is one document if it has up to
  about 1 MiB (`DOCUMENT_BYTES`), and a larger file is divided at line ends into documents of about 1 MiB.
- A row of a Parquet file is one document. pyarrow, which is optional, reads a few rows at a time.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard
from tqdm import tqdm

from maskmoe.data.inputs import Input, compression_of_name, find_inputs
from maskmoe.errors import UserError, listed
from maskmoe.files.parsing import refuse_surrogates

if TYPE_CHECKING:
    import pyarrow

DOCUMENT_BYTES = 1 << 20
"""Size in bytes beyond which a plain text file is divided into several documents."""
BLOCK_BYTES = 1 << 18
"""Approximate size in bytes of a block of JSON lines or of rows."""
MAX_BLOCK_BYTES = 1 << 30
"""Upper bound of the size in bytes of a document, which is in memory as a whole."""
_CHUNK_BYTES = 1 << 16
_PIECE_BYTES = 1 << 10
"""Compressed bytes that are decompressed at once; in zstd's format, 1 KiB can hold 32 MiB."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ZSTD_WINDOW_BYTES = 1 << 31  # the largest window, of `zstd --long=31`
# Both libraries' objects have `decompress`, `eof` and `unused_data`.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(),
}
_ROWS_READ_AT_ONCE = 512  # from a Parquet file
_MESSAGE_CHARACTERS = 200


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
            hint = "; --input-format text reads plain text" if self.source.is_stream else ""
            raise UserError(f"{self._place(number)}: invalid JSON ({error}){hint}") from error
        if not isinstance(values, dict):
            raise UserError(f'{self._place(number)}: expected a JSON object such as {{"{json_keys[0]}": "…"}}')
        texts = []
        for key in json_keys:
            if key not in values:
                found = listed([repr(name) for name in values], most=20)
                raise UserError(
                    f"{self._place(number)}: no key {key!r}; its keys are {found} (maskmoe preprocess and tokenizer "
                    "take --json-keys)"
                )
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
        UserError: The file cannot be read, its compression is damaged, or it counts as plain text by its name but
            begins with a JSON object.
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
                if number == 0 and source.is_guess and _begins_with_object(data):
                    raise UserError(
                        f"input {source.name} looks like JSON lines, but its name does not say so: pass --input-format "
                        "jsonl, or text if it is plain text"
                    )
                yield TextBlock(source, data.removeprefix(_BYTE_ORDER_MARK) if number == 0 else data, line)
                line += data.count(b"\n")
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"input {source.name} is damaged or truncated: {error}") from error
    except OSError as error:
        raise UserError(f"input {source.name} cannot be read: {error.strerror or error}") from error


def _begins_with_object(data: bytes) -> bool:
    """Return whether the first line of a file is a JSON object."""
    try:
        return isinstance(json.loads(data.partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


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
    pieces = (chunk[start : start + _PIECE_BYTES] for chunk in chunks for start in range(0, len(chunk), _PIECE_BYTES))
    for chunk in pieces:
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
        if len(block) > MAX_BLOCK_BYTES:
            raise EOFError(f"{MAX_BLOCK_BYTES:,} bytes have no line end or separator")
    if block:
        yield bytes(block)


@dataclass(frozen=True)
class TableBlock:
    """Texts of consecutive rows.

    Attributes:
        columns: The texts under each key.
    """

    columns: Mapping[str, list[str]]

    def documents(self, json_keys: Sequence[str]) -> list[list[str]]:
        """Return the texts of the rows: one list for each key."""
        return [self.columns[key] for key in json_keys]


def read_table(source: Input, keys: Sequence[str], advance: Callable[[int], object]) -> Iterator[TableBlock]:
    """Yield the rows of a Parquet file in blocks.

    Args:
        source: The file.
        keys: Names of the columns.
        advance: Takes the number of bytes of the file that were read since the last call.

    Raises:
        UserError: pyarrow is missing; the file is damaged; or a column is missing, is not text, or has a null.
    """
    first_row = 0
    with _reporting_damage(source):
        for batch in _read_batches(source, keys, advance):
            columns = {key: _text_column(source, key, batch.column(key), first_row) for key in keys}
            num_bytes = sum(column.nbytes for column in columns.values())
            rows = max(1, batch.num_rows * BLOCK_BYTES // max(1, num_bytes))
            for start in range(0, batch.num_rows, rows):
                yield TableBlock({key: column.slice(start, rows).to_pylist() for key, column in columns.items()})
            first_row += batch.num_rows


@contextmanager
def _reporting_damage(source: Input) -> Iterator[None]:
    """Report a missing pyarrow, and the errors that pyarrow raises for a damaged file, as a `UserError` of one line."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"reading {source.name} needs pyarrow, which is not installed: pip install 'maskmoe[data]'"
        ) from error
    try:
        yield
    except (pyarrow.ArrowException, EOFError, MemoryError, OSError, OverflowError, TypeError, ValueError) as error:
        # pyarrow raises an OSError without a number for damaged content, too.
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"input {source.name} cannot be read: {error.strerror}") from error
        message = " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
        raise UserError(f"input {source.name} is damaged or truncated, or no Parquet file: {message}") from error


def _read_batches(
    source: Input, keys: Sequence[str], advance: Callable[[int], object]
) -> Iterator["pyarrow.RecordBatch"]:
    from pyarrow.parquet import ParquetFile

    # Without `pre_buffer`, and with a small buffer, a column is read page by page.
    options = {"buffer_size": BLOCK_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with source.open() as stream, ParquetFile(stream, **options) as file:
        _check_columns(source, file.schema_arrow, keys)
        num_rows, rows_read = file.metadata.num_rows, 0
        for batch in file.iter_batches(_ROWS_READ_AT_ONCE, columns=list(dict.fromkeys(keys))):
            yield batch
            rows_read += batch.num_rows
            advance((source.num_bytes or 0) * batch.num_rows // max(1, num_rows))
        if rows_read != num_rows:
            raise EOFError(f"it has {rows_read} of {num_rows} rows")


def _check_columns(source: Input, schema: "pyarrow.Schema", keys: Sequence[str]) -> None:
    """Check that there is one column of text for each key. Raises UserError."""
    from pyarrow import types

    for key in keys:
        count = schema.names.count(key)
        if count != 1:
            found = listed(schema.names, most=20)
            problem = f"no column {key!r}" if count == 0 else f"{count} columns {key!r}"
            raise UserError(f"input {source.name} has {problem}; its columns are {found}: choose with --json-keys")
        kind = schema.field(key).type
        text = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
            raise UserError(f"input {source.name}: column {key!r} has the type {kind}, not text")


def _text_column(source: Input, key: str, column: "pyarrow.Array", first_row: int) -> "pyarrow.LargeStringArray":
    """Return the texts of consecutive rows after a check of their positions, their encoding and nulls."""
    import pyarrow

    column.validate(full=True)
    texts = column.cast(pyarrow.large_string())  # first, because the nulls of a dictionary's values are not counted
    if texts.null_count:
        row = first_row + texts.is_null().to_pylist().index(True)
        raise UserError(f"input {source.name}: row {row} (from 0): the value of {key!r} is not text, but null")
    return texts


Block = TextBlock | TableBlock


def read_blocks(
    inputs: Sequence[Input], json_keys: Sequence[str] = ("text",), bar: tqdm | None = None
) -> Iterator[Block]:
    """Yield the blocks of all inputs in order; only one block is in memory at a time.

    Args:
        inputs: The inputs, see `find_inputs`.
        json_keys: Names of the columns to read from Parquet files.
        bar: A progress bar to advance, see `progress_bar`.

    Raises:
        UserError: A file cannot be read, is damaged, or lacks a column of text.
    """
    advance = (tqdm(disable=True) if bar is None else bar).update
    for source in inputs:
        if source.format == "parquet":
            yield from read_table(source, json_keys, advance)
        else:
            yield from read_text(source, advance)


def progress_bar(inputs: Sequence[Input], description: str) -> tqdm:
    """Return a progress bar over the bytes of all inputs on disk, which is shown if stderr is a terminal.

    The bar has no end if the size of an input is unknown.
    """
    sizes = [source.num_bytes for source in inputs]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None)


def read_documents(paths: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """Yield all documents of all inputs in order.

    Args:
        paths: The inputs, see `find_inputs`.
        json_key: Key of a JSON line, or name of a column, whose value is the document.

    Raises:
        UserError: An input cannot be read or parsed.
    """
    for block in read_blocks(find_inputs(paths), [json_key]):
        yield from block.documents([json_key])[0]
