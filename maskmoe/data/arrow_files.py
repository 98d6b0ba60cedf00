"""Read columns of text from Parquet files and Arrow IPC files and streams in small blocks of rows.

Arrow files are mapped into memory, and Parquet files are read page by page, so memory does not grow with the size of a
file, a row group or a record batch. The blocks hold plain bytes, so worker processes need no pyarrow. pyarrow is
optional: it is imported when the first such file is read.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from maskmoe.data.inputs import STANDARD_INPUT, Input
from maskmoe.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ROW_BLOCK_BYTES = 1 << 18
"""Size in bytes at which a block of rows ends, after the row that exceeds it."""
_SAMPLED_ROWS = 64
_MOST_ROWS = 4096  # that are read from a Parquet file at a time
_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MESSAGE_CHARACTERS = 200


@dataclass(frozen=True)
class TextColumn:
    """Texts of consecutive rows.

    Attributes:
        data: The texts in UTF-8, one after the other.
        offsets: Position of each text in `data`, followed by the end of the last text, int64 [rows + 1].
    """

    data: bytes
    offsets: np.ndarray


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a file.

    Attributes:
        name: Name of the file for people.
        columns: The texts under each key.
        first_row: Number of the first row in the file, counted from 0.
        file_bytes: Share of the file's bytes that these rows take. A progress bar adds them up.
    """

    name: str
    columns: Mapping[str, TextColumn]
    first_row: int
    file_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of all texts in bytes."""
        return sum(len(column.data) for column in self.columns.values())


def parse_rows(block: RowBlock, keys: Sequence[str]) -> list[list[str]]:
    """Return the texts of a block: one list for each key.

    Raises:
        UserError: A text is not valid UTF-8.
    """
    return [_decode(block, key) for key in keys]


def _decode(block: RowBlock, key: str) -> list[str]:
    column = block.columns[key]
    texts: list[str] = []
    view = memoryview(column.data)
    try:
        for start, end in pairwise(column.offsets.tolist()):
            texts.append(str(view[start:end], "utf-8"))
    except UnicodeDecodeError as error:
        row = block.first_row + len(texts)
        raise UserError(f"{block.name}: row {row} (from 0): {key!r} has invalid UTF-8 ({error.reason})") from error
    return texts


def read_parquet(source: Input, keys: Sequence[str]) -> Iterator[RowBlock]:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: pyarrow is missing; the file is damaged; or a column is missing, is not text, or has a null.
    """
    columns = list(dict.fromkeys(keys))
    with _open_parquet(source) as file:
        _check_columns(source, file.schema_arrow, keys)
        groups = range(file.metadata.num_row_groups) if source.part is None else source.part
        rows_in_groups = [file.metadata.row_group(group).num_rows for group in range(groups.stop)]
        row, num_rows = sum(rows_in_groups[: groups.start]), sum(rows_in_groups[groups.start :])
        progress = _Progress(source.num_bytes or 0, max(1, num_rows))
        batch_size = _rows_of_block(file.iter_batches(_SAMPLED_ROWS, groups, columns=columns))
        for group in groups:
            first = row
            for batch in file.iter_batches(batch_size, [group], columns=columns):
                yield from _cut(source, batch, keys, row, progress)
                row += batch.num_rows
            if row - first != rows_in_groups[group]:
                raise UserError(f"input {source.name} is damaged: row group {group} lacks rows")


def _rows_of_block(batches: Iterator["pyarrow.RecordBatch"]) -> int:
    """Return the number of rows to read at a time, so that they make about one block like the rows of the first batch.

    The sizes that a file's metadata states are not used: pyarrow aborts the process if they are damaged.
    """
    sample = next(batches, None)
    if sample is None or sample.num_rows == 0:
        return _SAMPLED_ROWS
    return min(max(1, ROW_BLOCK_BYTES * sample.num_rows // max(1, sample.nbytes)), _MOST_ROWS)


def read_arrow(source: Input, keys: Sequence[str]) -> Iterator[RowBlock]:
    """Yield the rows of an Arrow IPC file or stream, which may come from a pipe.

    Raises:
        UserError: pyarrow is missing; the file is damaged; or a column is missing, is not text, or has a null.
    """
    row = 0
    with _reporting_damage(source), _open_bytes(source) as file:
        for batch, file_bytes in _record_batches(source, file, keys):
            _check_columns(source, batch.schema, keys)
            for column in (batch.column(key) for key in keys):
                _check_buffers(column)
            yield from _cut(source, batch, keys, row, _Progress(file_bytes, max(1, batch.num_rows)))
            row += batch.num_rows


def sizes_of_pieces(source: Input) -> list[int] | None:
    """Return the relative sizes of the pieces that a file can be divided into, see `Input.part`.

    The pieces are the row groups of a Parquet file or the record batches of an Arrow file. The result is None for an
    Arrow stream, which has no index of its record batches.

    Raises:
        UserError: pyarrow is missing, or the file is damaged.
    """
    if source.format == "parquet":
        with _open_parquet(source) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            return [max(1, group.total_byte_size) for group in groups]
    with _reporting_damage(source), _open_bytes(source) as file:
        return [1] * _import_ipc().open_file(file).num_record_batches if _is_file_format(source, file) else None


def _import_pyarrow(source: Input) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"reading {source.name} needs pyarrow, which is not installed: pip install 'maskmoe[data]'"
        ) from error
    return pyarrow


def _import_ipc() -> Any:
    import pyarrow.ipc

    return pyarrow.ipc


@contextmanager
def _reporting_damage(source: Input) -> Iterator[None]:
    """Report the errors that pyarrow raises for a damaged file as a `UserError` of one line."""
    pyarrow = _import_pyarrow(source)
    try:
        yield
    except (pyarrow.ArrowException, EOFError, MemoryError, OSError, OverflowError, TypeError, ValueError) as error:
        # pyarrow raises an OSError without a number for damaged content, too.
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"input {source.name} cannot be read: {error.strerror}") from error
        message = " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
        raise UserError(
            f"input {source.name} is damaged or truncated, or no {source.format} file: {message}"
        ) from error


@contextmanager
def _open_parquet(source: Input) -> Iterator[Any]:
    with _reporting_damage(source):
        from pyarrow.parquet import ParquetFile

        # Without `pre_buffer`, and with a small buffer, a column is read page by page.
        options = {"buffer_size": ROW_BLOCK_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        with source.open() as stream, ParquetFile(stream, **options) as file:
            yield file


@contextmanager
def _open_bytes(source: Input) -> Iterator[Any]:
    """Open a file for pyarrow: regular files by a memory map, pipes as a stream."""
    import pyarrow

    if _is_mapped(source):
        if source.num_bytes == 0:
            raise EOFError("it is empty")
        # pyarrow takes the bytes of any name, but only names in UTF-8 as text.
        with pyarrow.memory_map(os.fsencode(source.path)) as file:
            yield file
        return
    with source.open() as stream, pyarrow.PythonFile(stream, mode="r") as file:
        yield file


def _is_mapped(source: Input) -> bool:
    return source.num_bytes is not None and source.path != STANDARD_INPUT


def _is_file_format(source: Input, file: "pyarrow.NativeFile") -> bool:
    """Return whether an open file has Arrow's file format, not its stream format."""
    if not _is_mapped(source):
        return False
    magic = file.read(len(_FILE_MAGIC))
    file.seek(0)
    return magic == _FILE_MAGIC


def _record_batches(
    source: Input, file: "pyarrow.NativeFile", keys: Sequence[str]
) -> Iterator[tuple["pyarrow.RecordBatch", int]]:
    """Yield each record batch, and the bytes that it takes in the file."""
    ipc = _import_ipc()
    if _is_file_format(source, file):
        reader = ipc.open_file(file)
        _check_columns(source, reader.schema, keys)
        numbers = range(reader.num_record_batches) if source.part is None else source.part
        progress = _Progress(source.num_bytes or 0, max(1, len(numbers)))
        for number in numbers:
            yield reader.get_batch(number), progress.advance(1)
        return
    if _is_mapped(source):
        file.seek(max(0, file.size() - len(_END_OF_STREAM)))
        if file.read() != _END_OF_STREAM:
            raise EOFError("the stream has no end")
        file.seek(0)
    reader = ipc.open_stream(file)
    _check_columns(source, reader.schema, keys)
    position = 0
    for batch in reader:
        # A pipe has no position.
        previous, position = position, file.tell() if _is_mapped(source) else position + batch.nbytes
        yield batch, position - previous


def _check_columns(source: Input, schema: "pyarrow.Schema", keys: Sequence[str]) -> None:
    for key in keys:
        count = schema.names.count(key)
        if count != 1:
            listed = ", ".join(schema.names[:20]) + (", …" if len(schema.names) > 20 else "")
            problem = f"no column {key!r}" if count == 0 else f"{count} columns {key!r}"
            raise UserError(
                f"input {source.name} has {problem}; its columns are {listed}: choose with --json-keys or --json-key"
            )
        if not _is_text(schema.field(key).type):
            raise UserError(f"input {source.name}: column {key!r} has the type {schema.field(key).type}, not text")


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _check_buffers(column: "pyarrow.Array") -> None:
    """Check that all positions in a column lie inside its data; raise ArrowInvalid otherwise.

    The text itself is checked when it is decoded.
    """
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column.validate(full=True)
    else:
        binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
        column.view(binary.get(column.type, pyarrow.binary_view())).validate(full=True)


class _Progress:
    """Divides the bytes of a file among its rows, so that the shares add up to all bytes."""

    def __init__(self, num_bytes: int, num_rows: int) -> None:
        self._num_bytes, self._num_rows, self._rows = num_bytes, num_rows, 0

    def advance(self, rows: int) -> int:
        """Return the bytes of the next rows."""
        before = self._num_bytes * self._rows // self._num_rows
        self._rows += rows
        return self._num_bytes * self._rows // self._num_rows - before


def _cut(
    source: Input, batch: "pyarrow.RecordBatch", keys: Sequence[str], first_row: int, progress: _Progress
) -> Iterator[RowBlock]:
    """Divide a record batch into blocks; a block ends after the row that makes it larger than `ROW_BLOCK_BYTES`."""
    import pyarrow
    from pyarrow import types

    arrays = {key: batch.column(key) for key in keys}
    # A view has no function for its lengths.
    arrays = {
        key: array.cast(pyarrow.large_string()) if types.is_string_view(array.type) else array
        for key, array in arrays.items()
    }
    ends = np.cumsum(sum(_lengths(array) for array in arrays.values()))
    start, num_rows = 0, batch.num_rows
    while start < num_rows:
        before = ends[start - 1] if start else 0
        stop = min(int(np.searchsorted(ends, before + ROW_BLOCK_BYTES)) + 1, num_rows)
        row = first_row + start
        columns = {
            key: _text_column(source, key, array.slice(start, stop - start), row) for key, array in arrays.items()
        }
        yield RowBlock(source.name, columns, row, progress.advance(stop - start))
        start = stop


def _lengths(array: "pyarrow.Array") -> np.ndarray:
    """Return the bytes of each text, 0 for a null, int64 [rows]."""
    import pyarrow
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(array.type):
        lengths = pc.take(pc.call_function("binary_length", [array.dictionary]), array.indices)
    else:
        lengths = pc.call_function("binary_length", [array])
    lengths = lengths.cast(pyarrow.int64())
    if not len(lengths):
        return np.zeros(0, np.int64)
    # `fill_null` and `to_numpy` would import pandas if it is installed, which takes as long as to encode 1 MB of text.
    rows = slice(lengths.offset, lengths.offset + len(lengths))
    validity, values = lengths.buffers()
    numbers = np.frombuffer(values, np.int64)[rows]
    if validity is None:
        return numbers
    return numbers * np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[rows]


def _text_column(source: Input, key: str, array: "pyarrow.Array", first_row: int) -> TextColumn:
    """Copy the texts of consecutive rows. Raises UserError if one is null."""
    import pyarrow

    array = array.cast(pyarrow.large_string())
    if array.null_count:
        row = first_row + array.is_null().to_pylist().index(True)
        raise UserError(f"input {source.name}: row {row} (from 0): the value of {key!r} is not text, but null")
    _, offsets_buffer, data = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return TextColumn(data[first:last].to_pybytes() if last > first else b"", offsets - first)
