"""Parquet and Arrow files, written by pyarrow, give the documents that pyarrow itself reads."""

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from maskmoe.data import tables
from maskmoe.data.documents import read_blocks, read_documents
from maskmoe.data.inputs import find_inputs
from maskmoe.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"))
TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "large dictionary": pa.dictionary(pa.int32(), pa.large_string()),
}


def write_stream(table: pa.Table, path: Path, **options: object) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=7)


def write_file(table: pa.Table, path: Path, **options: object) -> None:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=7)


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "a.parquet": lambda table, path: pq.write_table(table, path, row_group_size=5),
    "b.PARQUET": lambda table, path: pq.write_table(
        table, path, compression="zstd", data_page_version="2.0", write_page_checksum=True
    ),
    "stream.arrow": write_stream,
    "compressed-stream.arrow": lambda table, path: write_stream(table, path, compression="zstd"),
    "file.arrow": write_file,
    "compressed-file.ipc": lambda table, path: write_file(table, path, compression="lz4"),
}


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(TEXT, max_size=20), kind=st.sampled_from([*TYPES]), block_bytes=st.integers(1, 50))
def test_documents(name: str, tmp_path: Path, documents: list[str], kind: str, block_bytes: int) -> None:
    column = pa.array(documents, TYPES[kind])
    table = pa.table({"id": range(len(documents)), "text": column, "vector": [[0.5]] * len(documents)})
    path = tmp_path / name
    WRITERS[name](table, path)
    inputs = find_inputs([path])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK_BYTES", block_bytes)
        patch.setattr(tables, "_ROWS_READ_AT_ONCE", 3)
        blocks = list(read_blocks(inputs))
    assert [text for block in blocks for text in block.documents(["text"])[0]] == documents


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_blocks_are_small_and_advance_the_progress_bar(name: str, tmp_path: Path) -> None:
    documents = [f"{number:04}" * 1000 for number in range(1000)]
    WRITERS[name](pa.table({"text": documents}), tmp_path / name)
    with tqdm(file=io.StringIO()) as bar:
        blocks = list(read_blocks(find_inputs([tmp_path / name]), bar=bar))
        assert bar.n == pytest.approx((tmp_path / name).stat().st_size, rel=0.3)
    assert max(block.num_bytes for block in blocks) < 2 * tables.BLOCK_BYTES
    assert sum(block.num_bytes for block in blocks) >= 4_000_000


def test_several_keys(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a.b": ["1", "2"], "q": ["3", "4"], "a": [{"b": 1}] * 2}), tmp_path / "a.parquet")
    (block,) = read_blocks(find_inputs([tmp_path / "a.parquet"]), ["q", "a.b"])
    assert block.documents(["q", "a.b"]) == [["3", "4"], ["1", "2"]]


INVALID = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"], pa.binary()).buffers())


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pa.table({"body": ["a"], "id": [1]}),
            "has no column 'text'; its columns are body, id: choose with --json",
        ),
        (pa.table({"text": [1]}), "column 'text' has the type int64, not text"),
        (pa.table({"text": [b"a"]}), "column 'text' has the type binary, not text"),
        (pa.table({"text": [["a"]]}), r"column 'text' has the type list<.*>, not text"),
        (pa.table({"text": pa.nulls(2)}), "column 'text' has the type null, not text"),
        (pa.table({"text": ["a"] * 9 + [None, "b"]}), r"row 9 \(from 0\): the value of 'text' is not text, but null"),
        (
            pa.table({"text": pa.array(["a"] * 9 + [None, "b"]).dictionary_encode()}),
            r"row 9 \(from 0\): the value of 'text' is not text, but null",
        ),
        (pa.table({"text": INVALID}), "damaged or truncated, .*: Invalid UTF8 sequence at string index 1"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "has 2 columns 'text'"),
    ],
)
def test_unusable_columns(tmp_path: Path, name: str, table: pa.Table, message: str) -> None:
    WRITERS[name](table, tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_that_ends_between_two_batches_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_stream(pa.table({"text": ["a"] * 40}), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        list(read_documents([path]))


@pytest.mark.parametrize("name", [*WRITERS])
def test_damaged_files_give_one_line_or_documents(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    documents = [f"text {number} é " * draw.randrange(20) for number in range(40)]
    kind = draw.choice([*TYPES.values()])
    WRITERS[name](pa.table({"text": pa.array(documents, kind), "id": range(40)}), tmp_path / name)
    intact = (tmp_path / name).read_bytes()
    num_errors = 0
    for _ in range(60):
        content = bytearray(intact)
        for _ in range(draw.choice([1, 1, 2, 8])):
            # Most damage is done to the metadata at the start and the end.
            start = draw.choice([0, draw.randrange(len(content)), max(0, len(content) - 600)])
            content[min(start + draw.randrange(600), len(content) - 1)] = draw.choice(
                [0, 127, 255, draw.randrange(256)]
            )
        path = tmp_path / f"damaged-{name}"
        path.write_bytes(content[: draw.randrange(len(content))] if draw.random() < 0.1 else content)
        found, message = documents_or_error(path)
        # Damage in the text itself cannot be noticed, but no document is lost.
        assert len(found) == (0 if message else 40)
        assert "\n" not in message
        assert len(message) < 500
        num_errors += message != ""
    assert num_errors > 10


def documents_or_error(path: Path) -> tuple[list[str], str]:
    try:
        return list(read_documents([path])), ""
    except UserError as error:
        return [], str(error)


def test_parquet_pages_with_checksums_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["unique words here"]})
    pq.write_table(
        table, path, write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"unique", b"unisex", 1))
    with pytest.raises(UserError, match="damaged or truncated"):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_large_files_need_little_memory(tmp_path: Path, name: str) -> None:
    num_bytes = 60 << 20
    table = pa.table({"text": [f"{number:04}" * (1 << 12) for number in range(num_bytes >> 14)]})
    if name == "a.parquet":
        # The size of a page is checked after each `write_batch_size` rows.
        pq.write_table(table, tmp_path / name, use_dictionary=False, compression="none", write_batch_size=16)
    else:
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    del table
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_blocks(find_inputs([tmp_path / name])):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < num_bytes / 4


def test_pyarrow_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow, which is not installed: pip install 'maskmoe\[data\]'"):
        list(read_documents([tmp_path / "a.parquet"]))
