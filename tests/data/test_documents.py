"""Files of text and of tables, compressed or not, give their documents, whatever the sizes of blocks and chunks."""

import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from maskmoe.data import documents as documents_module
from maskmoe.data.documents import read_blocks, read_documents
from maskmoe.data.inputs import find_inputs
from maskmoe.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
COMPRESS |= {".GZ": gzip.compress, ".gzip": gzip.compress, ".Zst": zstandard.compress, ".zstd": zstandard.compress}
TEXT = st.text(st.characters(codec="utf-8"))


@given(documents=st.lists(TEXT, max_size=8), ascii_only=st.booleans(), suffix=st.sampled_from([*COMPRESS]))
def test_json_lines(tmp_path: Path, documents: list[str], ascii_only: bool, suffix: str) -> None:
    lines = (json.dumps({"text": text, "other": 1}, ensure_ascii=ascii_only) for text in documents)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    assert list(read_documents([path])) == documents


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(documents_module, "DOCUMENT_BYTES", 1000)
    text = "".join(f"line {i} é\r\n\n" for i in range(200))
    for name in ("a.py", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    documents = list(read_documents([tmp_path / f"{name}{suffix}" for name in ("a.py", "b")]))
    assert "".join(documents) == text * 2
    assert all(document.endswith("\n") and len(document.encode()) < 1020 for document in documents)
    assert 4 < len(documents) < 12


def test_blocks_know_their_first_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * i}).encode() + b"\n" for i in range(50)]
    path.write_bytes(b"".join(lines))
    with tqdm(file=io.StringIO()) as bar:
        blocks = list(read_blocks(find_inputs([path]), bar=bar))
        assert bar.n == path.stat().st_size
    assert len(blocks) > 5
    assert all(block.data.startswith(lines[block.first_line - 1]) for block in blocks)
    assert b"".join(block.data for block in blocks) == path.read_bytes()


def test_highly_compressed_data_is_read_in_small_pieces() -> None:
    compressed = zstandard.compress(bytes(1 << 27))
    assert len(compressed) < 1 << 15
    pieces = [
        len(piece) for piece in documents_module._decompress([compressed], documents_module._DECOMPRESSORS["zstd"])
    ]
    assert sum(pieces) == 1 << 27
    assert max(pieces) <= 1 << 25


def test_zstd_with_the_largest_window(tmp_path: Path) -> None:
    text = b"one\ntwo\n"
    # The frame has a window of 2 GiB, as by `zstd --long=31`, and a single block that is not compressed.
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (len(text) << 3 | 1).to_bytes(3, "little") + text
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert list(read_documents([tmp_path / "a.txt.zst"])) == [text.decode()]


@pytest.mark.parametrize(("suffix", "padding"), [(".zst", b""), (".gz", bytes(100_000))])
def test_compressed_parts_follow_each_other(tmp_path: Path, suffix: str, padding: bytes) -> None:
    """Parts are zstd's frames or gzip's members, which may be padded."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two\n") + padding)
    assert list(read_documents([path])) == ["one\ntwo\n"]


def test_a_block_ends_after_the_line_that_exceeds_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "DOCUMENT_BYTES", 4)
    monkeypatch.setattr(documents_module, "_CHUNK_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\nd\nefghijklm\n\nno\np")
    assert list(read_documents([path])) == ["abc\nd\n", "efghijklm\n", "\nno\np"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"body": "a", "id": 1}', "no key 'text'; its keys are 'body', 'id': choose"),
        (b'{"text": 5}', "the value of 'text' is not text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": ' + b"[" * 100_000, "invalid JSON"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 18])
def test_bad_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xc3\xa9"}\n\n{"text"\t:""}' + b"\n" + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=f"a.jsonl: line 4: .*{message}"):
        list(read_documents([path]))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_in_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bom: bytes) -> None:
    monkeypatch.setattr(documents_module, "DOCUMENT_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(bom + b"one\ntwo\nth\xffee\n")
    with pytest.raises(UserError, match=r"a.txt: line 3: invalid UTF-8"):
        list(read_documents([tmp_path / "a.txt"]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"none" + data])
def test_damaged_compression(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](bytes(range(32, 127)) * 1000)))
    with pytest.raises(UserError, match=rf"a.txt{suffix} is damaged or truncated"):
        list(read_documents([path]))


# ---- Plain text with a separator -------------------------------------------------------------------------------------


def separated(path: Path, separator: str) -> list[str]:
    blocks = read_blocks(find_inputs([path], separator=separator))
    return [text for block in blocks for text in block.documents(["text"])[0]]


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "aa", "é", "\0", "abab"])
@given(data=st.data(), block_bytes=st.integers(1, 40), chunk_bytes=st.integers(1, 9))
def test_separators(tmp_path: Path, separator: str, data: st.DataObject, block_bytes: int, chunk_bytes: int) -> None:
    parts = st.one_of(st.just(separator), st.sampled_from([*separator, "\n", " ", "x", "日"]), st.text(max_size=3))
    text = "".join(data.draw(st.lists(parts, max_size=30)))
    path = tmp_path / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BLOCK_BYTES", block_bytes)
        patch.setattr(documents_module, "_CHUNK_BYTES", chunk_bytes)
        path.write_bytes(text.encode())
        found = separated(path, separator)
    assert found == [part for part in text.removeprefix("\ufeff").split(separator) if part.strip()]


def test_a_document_between_separators_is_not_divided(tmp_path: Path) -> None:
    long = "line\n" * (documents_module.DOCUMENT_BYTES // 2)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(f"a--{long}--b\n".encode(), 1))
    assert separated(tmp_path / "a.txt.gz", "--") == ["a", long, "b\n"]


def test_invalid_utf8_between_separators_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"one\n--two\n--th\xffree\n")
    with pytest.raises(UserError, match=r"a\.txt: line 3: invalid UTF-8"):
        separated(tmp_path / "a.txt", "--")


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
@given(documents=st.lists(TEXT, max_size=20), kind=st.sampled_from([*TYPES]), block_bytes=st.integers(1, 50))
def test_documents(name: str, tmp_path: Path, documents: list[str], kind: str, block_bytes: int) -> None:
    column = pa.array(documents, TYPES[kind])
    table = pa.table({"id": range(len(documents)), "text": column, "vector": [[0.5]] * len(documents)})
    path = tmp_path / name
    WRITERS[name](table, path)
    inputs = find_inputs([path])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BLOCK_BYTES", block_bytes)
        patch.setattr(documents_module, "_ROWS_READ_AT_ONCE", 3)
        blocks = list(read_blocks(inputs))
    assert [text for block in blocks for text in block.documents(["text"])[0]] == documents


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_blocks_are_small_and_advance_the_progress_bar(name: str, tmp_path: Path) -> None:
    documents = [f"{number:04}" * 1000 for number in range(1000)]
    WRITERS[name](pa.table({"text": documents}), tmp_path / name)
    with tqdm(file=io.StringIO()) as bar:
        blocks = list(read_blocks(find_inputs([tmp_path / name]), bar=bar))
        assert bar.n == pytest.approx((tmp_path / name).stat().st_size, rel=0.3)
    sizes = [sum(map(len, block.documents(["text"])[0])) for block in blocks]
    assert max(sizes) < 2 * documents_module.BLOCK_BYTES
    assert sum(sizes) == 4_000_000


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


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
def test_a_null_among_the_values_of_a_dictionary_is_refused(tmp_path: Path, name: str) -> None:
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 9 + [1], ["a", None])})
    WRITERS[name](table, tmp_path / name)
    with pytest.raises(UserError, match=r"row 9 \(from 0\): the value of 'text' is not text, but null"):
        list(read_documents([tmp_path / name]))


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
