"""Files of text and of tables, compressed or not, give their documents, whatever the sizes of blocks and chunks."""

import gzip
import io
import json
import random
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


TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "large dictionary": pa.dictionary(pa.int32(), pa.large_string()),
}


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "a.parquet": lambda table, path: pq.write_table(table, path, row_group_size=5),
    "b.PARQUET": lambda table, path: pq.write_table(
        table, path, compression="zstd", data_page_version="2.0", write_page_checksum=True
    ),
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
