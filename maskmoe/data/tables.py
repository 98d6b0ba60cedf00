"""Read columns of text from Parquet files and from Arrow IPC files and streams, with pyarrow.

Arrow files are mapped into memory, and Parquet files are read a few rows at a time, so memory does not grow with the
size of a file. pyarrow is optional: it is imported when the first such file is read.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskmoe.data.inputs import Input
from maskmoe.errors import UserError

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 1 << 18
"""Approximate size in bytes of a block of rows."""
_ROWS_READ_AT_ONCE = 512  # from a Parquet file
_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MESSAGE_CHARACTERS = 200


@dataclass(frozen=True)
class TableBlock:
    """Texts of consecutive rows.

    Attributes:
        columns: The texts under each key.
        num_bytes: Size of all texts in bytes.
    """

    columns: Mapping[str, list[str]]
    num_bytes: int

    def documents(self, json_keys: Sequence[str]) -> list[list[str]]:
        """Return the texts of the rows: one list for each key."""
        return [self.columns[key] for key in json_keys]


def read_table(source: Input, keys: Sequence[str], advance: Callable[[int], object]) -> Iterator[TableBlock]:
    """Yield the rows of a Parquet or Arrow file in blocks.

    Args:
        source: The file.
        keys: Names of the columns.
        advance: Takes the number of bytes of the file that were read since the last call.

    Raises:
        UserError: pyarrow is missing; the file is damaged; or a column is missing, is not text, or has a null.
    """
    first_row = 0
    with _reporting_damage(source):
        read_batches = _read_parquet if source.format == "parquet" else _read_arrow
        for batch in read_batches(source, keys, advance):
            columns = {key: _text_column(source, key, batch.column(key), first_row) for key in keys}
            num_bytes = sum(column.nbytes for column in columns.values())
            rows = max(1, batch.num_rows * BLOCK_BYTES // max(1, num_bytes))
            for start in range(0, batch.num_rows, rows):
                parts = {key: column.slice(start, rows) for key, column in columns.items()}
                texts = {key: part.to_pylist() for key, part in parts.items()}
                yield TableBlock(texts, sum(part.nbytes for part in parts.values()))
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
        raise UserError(
            f"input {source.name} is damaged or truncated, or no {source.format} file: {message}"
        ) from error


def _read_parquet(
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


def _read_arrow(
    source: Input, keys: Sequence[str], advance: Callable[[int], object]
) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow
    import pyarrow.ipc

    if source.num_bytes == 0:
        raise EOFError("it is empty")
    # pyarrow takes the bytes of any name, but only names in UTF-8 as text.
    with pyarrow.memory_map(os.fsencode(source.path)) as file:
        if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            # pyarrow does not notice that a stream ends between two record batches.
            file.seek(max(0, file.size() - len(_END_OF_STREAM)))
            if file.read() != _END_OF_STREAM:
                raise EOFError("the stream has no end")
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        _check_columns(source, reader.schema, keys)
        for batch in batches:
            yield batch
            advance(batch.get_total_buffer_size())


def _check_columns(source: Input, schema: "pyarrow.Schema", keys: Sequence[str]) -> None:
    """Check that there is one column of text for each key. Raises UserError."""
    from pyarrow import types

    for key in keys:
        count = schema.names.count(key)
        if count != 1:
            listed = ", ".join(schema.names[:20]) + (", …" if len(schema.names) > 20 else "")
            problem = f"no column {key!r}" if count == 0 else f"{count} columns {key!r}"
            raise UserError(f"input {source.name} has {problem}; its columns are {listed}: choose with --json-keys")
        kind = schema.field(key).type
        text = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
            raise UserError(f"input {source.name}: column {key!r} has the type {kind}, not text")


def _text_column(source: Input, key: str, column: "pyarrow.Array", first_row: int) -> "pyarrow.LargeStringArray":
    """Return the texts of consecutive rows after a check of their positions, their encoding and nulls."""
    import pyarrow

    column.validate(full=True)
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise UserError(f"input {source.name}: row {row} (from 0): the value of {key!r} is not text, but null")
    return column.cast(pyarrow.large_string())
