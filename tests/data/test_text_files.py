"""JSON lines and plain text, compressed or not, give their documents, whatever the sizes of blocks and chunks."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from maskmoe.data import text_files
from maskmoe.data.documents import read_blocks, read_documents
from maskmoe.data.inputs import ReadingOptions, find_inputs
from maskmoe.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
COMPRESS |= {".GZ": gzip.compress, ".gzip": gzip.compress, ".Zst": zstandard.compress, ".zstd": zstandard.compress}
TEXT = st.text(st.characters(codec="utf-8"))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(TEXT, max_size=8), ascii_only=st.booleans(), suffix=st.sampled_from([*COMPRESS]))
def test_json_lines(tmp_path: Path, documents: list[str], ascii_only: bool, suffix: str) -> None:
    lines = (json.dumps({"text": text, "other": 1}, ensure_ascii=ascii_only) for text in documents)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    assert list(read_documents([path])) == documents


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 1000)
    text = "".join(f"line {i} é\r\n\n" for i in range(200))
    for name in ("a.py", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    documents = list(read_documents([tmp_path / f"{name}{suffix}" for name in ("a.py", "b")]))
    assert "".join(documents) == text * 2
    assert all(document.endswith("\n") and len(document.encode()) < 1020 for document in documents)
    assert 4 < len(documents) < 12


def test_blocks_know_their_first_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * i}).encode() + b"\n" for i in range(50)]
    path.write_bytes(b"".join(lines))
    with tqdm(file=io.StringIO()) as bar:
        blocks = list(read_blocks(find_inputs([path]), bar=bar))
        assert bar.n == path.stat().st_size
    assert len(blocks) > 5
    assert all(block.data.startswith(lines[block.first_line - 1]) for block in blocks)
    assert b"".join(block.data for block in blocks) == path.read_bytes()


def test_zstd_with_the_largest_window(tmp_path: Path) -> None:
    text = b"one\ntwo\n"
    # The frame has a window of 2 GiB, as by `zstd --long=31`, and a single block that is not compressed.
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (len(text) << 3 | 1).to_bytes(3, "little") + text
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert list(read_documents([tmp_path / "a.txt.zst"])) == [text.decode()]


def test_zstd_frames_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one\n") + zstandard.compress(b"two\n"))
    assert list(read_documents([path])) == ["one\ntwo\n"]


def test_gzip_members_follow_each_other_and_may_be_padded(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n") + bytes(100_000))
    assert list(read_documents([path])) == ["one\ntwo\n"]


def test_a_block_ends_after_the_line_that_exceeds_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 4)
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\nd\nefghijklm\n\nno\np")
    assert list(read_documents([path])) == ["abc\nd\n", "efghijklm\n", "\nno\np"]


def test_json_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": "2"}\n\n  \n{"q": "3", "a": "4"}\n')
    (block,) = read_blocks(find_inputs([tmp_path / "a.jsonl"]))
    assert block.documents(["q", "a"]) == [["1", "3"], ["2", "4"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"body": "a"}', "no key 'text'"),
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
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xc3\xa9"}\n\n{"text"\t:""}' + b"\n" + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=f"a.jsonl: line 4: .*{message}"):
        list(read_documents([path]))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_in_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bom: bytes) -> None:
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 4)
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
    blocks = read_blocks(find_inputs([path], ReadingOptions(separator=separator)))
    return [text for block in blocks for text in block.documents(["text"])[0]]


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "aa", "é", "\0", "abab"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block_bytes=st.integers(1, 40), chunk_bytes=st.integers(1, 9))
def test_separators(tmp_path: Path, separator: str, data: st.DataObject, block_bytes: int, chunk_bytes: int) -> None:
    parts = st.one_of(st.just(separator), st.sampled_from([*separator, "\n", " ", "x", "日"]), st.text(max_size=3))
    text = "".join(data.draw(st.lists(parts, max_size=30)))
    path = tmp_path / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block_bytes)
        patch.setattr(text_files, "_CHUNK_BYTES", chunk_bytes)
        path.write_bytes(text.encode())
        found = separated(path, separator)
    assert found == [part for part in text.removeprefix("\ufeff").split(separator) if part.strip()]


def test_a_document_between_separators_is_not_divided(tmp_path: Path) -> None:
    long = "line\n" * (text_files.DOCUMENT_BYTES // 2)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(f"a--{long}--b\n".encode(), 1))
    assert separated(tmp_path / "a.txt.gz", "--") == ["a", long, "b\n"]


def test_invalid_utf8_between_separators_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"one\n--two\n--th\xffree\n")
    with pytest.raises(UserError, match=r"a\.txt: line 3: invalid UTF-8"):
        separated(tmp_path / "a.txt", "--")
