import gzip
import inspect
import json
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tools import run_tool

from maskmoe.data import corpus
from maskmoe.data.corpus import parse_block, read_blocks, read_documents
from maskmoe.data.default_corpus import default_corpus, is_written_by_people
from maskmoe.data.inputs import find_inputs
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
    monkeypatch.setattr(corpus, "DOCUMENT_BYTES", 1000)
    text = "".join(f"line {i} é\r\n\n" for i in range(200))
    for name in ("a.py", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    documents = list(read_documents([tmp_path / f"{name}{suffix}" for name in ("a.py", "b")]))
    assert "".join(documents) == text * 2
    assert all(document.endswith("\n") and len(document.encode()) < 1020 for document in documents)
    assert 4 < len(documents) < 12


def test_blocks_know_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * i}).encode() + b"\n" for i in range(50)]
    path.write_bytes(b"".join(lines))
    blocks = list(read_blocks(find_inputs([path])))
    assert len(blocks) > 5
    for block in blocks:
        assert block.data == path.read_bytes()[block.offset :][: len(block.data)]
        assert block.data.startswith(lines[block.first_line - 1])
    assert b"".join(block.data for block in blocks) == path.read_bytes()
    assert sum(block.file_bytes for block in blocks) == path.stat().st_size


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
    monkeypatch.setattr(corpus, "DOCUMENT_BYTES", 4)
    monkeypatch.setattr(corpus, "_CHUNK_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\nd\nefghijklm\n\nno\np")
    assert list(read_documents([path])) == ["abc\nd\n", "efghijklm\n", "\nno\np"]


def test_json_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": "2"}\n\n  \n{"q": "3", "a": "4"}\n')
    (block,) = read_blocks(find_inputs([tmp_path / "a.jsonl"]))
    assert parse_block(block, ["q", "a"]) == [["1", "3"], ["2", "4"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"body": "a"}', "no key 'text'"),
        (b'{"text": 5}', "the value of 'text' is not text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 39"),
        (b'{"text": ' + b"[" * 100_000, "invalid JSON"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 18])
def test_bad_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xc3\xa9"}\n\n{"text"\t:""}' + b"\n" + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=f"a.jsonl: line 4: .*{message}"):
        list(read_documents([path]))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_in_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bom: bytes) -> None:
    monkeypatch.setattr(corpus, "DOCUMENT_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(bom + b"one\ntwo\nth\xffee\n")
    with pytest.raises(UserError, match=rf"a.txt: line 3: invalid UTF-8 at byte {10 + len(bom)} "):
        list(read_documents([tmp_path / "a.txt"]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"none" + data])
def test_damaged_compression(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](bytes(range(32, 127)) * 1000)))
    with pytest.raises(UserError, match=rf"a.txt{suffix} is damaged or truncated"):
        list(read_documents([path]))


def test_missing_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt does not exist"):
        find_inputs([tmp_path / "a.txt"])
    with pytest.raises(UserError, match="is a folder"):
        find_inputs([tmp_path])


def test_default_corpus() -> None:
    documents = list(default_corpus(6_000_000))
    assert documents == list(default_corpus(6_000_000))
    assert 5_800_000 <= sum(len(document.text.encode()) for document in documents) <= 6_000_000
    assert len({document.text for document in documents}) == len(documents)
    assert all(len(line.encode()) <= 1000 for document in documents for line in document.text.split("\n"))
    assert max(len(document.text.encode()) for document in documents) <= 1 << 15


def test_held_out_text_of_the_default_corpus_resembles_the_corpus() -> None:
    """The last 2 % of the shuffled documents are many small files, with about as many digits as the other documents."""
    texts = [document.text for document in default_corpus(32 << 20)]
    random.Random(0).shuffle(texts)
    held_out, size = [], 0
    while size < sum(map(len, texts)) / 50:
        held_out.append(texts.pop())
        size += len(held_out[-1])

    def share_of_digits(texts: list[str]) -> float:
        sample = "".join(texts)
        return sum(map(sample.count, "0123456789")) / len(sample)

    assert len(held_out) > 40
    assert max(map(len, held_out)) < 0.06 * size
    assert 0.5 < share_of_digits(held_out) / share_of_digits(texts) < 2


def table_of_digits(num_lines: int) -> str:
    draw = random.Random(0)
    return "".join(" ".join(f"{draw.random():.6f}" for _ in range(8)) + "\n" for _ in range(num_lines))


SOURCE = inspect.getsource(random)
NUMBERS_AND_TABLES = {
    "few numbers": "0.25 17 3\n" * 50,
    "table of floats": table_of_digits(500),
    "table of code points": "".join(f"    0x{code:04X},\n" for code in range(500)),
    "table of words": "TABLE = {\n"
    + "".join(f"    'name_{'x' * (code % 7)}': 'value',\n" for code in range(300))
    + "}\n",
    "source with an embedded table": SOURCE + table_of_digits(1000),
    "one long line": SOURCE + "x" * 1001 + "\n",
}
WRITTEN = {
    "source": SOURCE,
    "documentation": inspect.getdoc(random.Random.choices) or "",
    "source with numbers": SOURCE + table_of_digits(50),
    "short list of names": "__all__ = [\n" + "".join(f"    'name{number}',\n" for number in range(150)) + "]\n",
    "blank lines": "Some words.\n" + "\n" * 1000 + "More words.\n",
    "empty": "",
}


@pytest.mark.parametrize("name", NUMBERS_AND_TABLES)
def test_numbers_and_tables_are_recognised(name: str) -> None:
    assert not is_written_by_people(NUMBERS_AND_TABLES[name].encode())


@pytest.mark.parametrize("name", WRITTEN)
def test_prose_and_source_are_recognised(name: str) -> None:
    assert is_written_by_people(WRITTEN[name].encode())


def test_default_corpus_leaves_files_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path)))
    source = SOURCE[: 1 << 14]
    (tmp_path / "package" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "package" / "b.md").write_text("Words, one after the other.\n" * 12)
    (tmp_path / "same.py").write_text(source)
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "huge.py").write_text(source * 5)
    (tmp_path / "numbers.txt").write_text(table_of_digits(20))
    (tmp_path / "latin.txt").write_bytes(source.encode() + b"\xe9")
    (tmp_path / "binary.so").write_text(source + "1")
    (tmp_path / "package" / "__pycache__" / "c.py").write_text(source + "2")
    assert [document.path for document in default_corpus(1 << 20)] == ["a.py", "package/b.md"]
    assert [document.path for document in default_corpus(len(source.encode()))] == ["a.py"]


def test_make_corpus(tmp_path: Path) -> None:
    outputs: Sequence[Path] = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        result = run_tool("make_corpus", "--output", output, "--max-bytes", 300_000, "--seed", seed)
        assert result.returncode == 0, result.stderr
    first, second, other = (output.read_bytes() for output in outputs)
    assert first == second != other
    assert sorted(first.splitlines()) == sorted(other.splitlines())
    expected = {document.path: document.text for document in default_corpus(300_000)}
    assert {values["path"]: values["text"] for values in map(json.loads, first.splitlines())} == expected
