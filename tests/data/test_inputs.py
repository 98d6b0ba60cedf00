"""Files, pipes and standard input are found and divided; other names are refused by one line."""

import gzip
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from maskmoe.command_line import preprocess_data, train_tokenizer
from maskmoe.data.documents import read_blocks
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.data.inputs import Input, Shard, find_inputs, take_shard, unescape
from maskmoe.errors import UserError

LINES = b"".join(json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(50))
DOCUMENTS = [f"text {number}" for number in range(50)]


def documents(name: Path | str, *options: str | None) -> list[str]:
    return texts_of(find_inputs([name], *options))


def texts_of(inputs: Sequence[Input]) -> list[str]:
    return [text for block in read_blocks(inputs) for text in block.documents(["text"])[0]]


@pytest.fixture
def standard_input() -> Iterator[Callable[[bytes | Path | None], None]]:
    """A function that makes a pipe with some bytes, or a file, the standard input; None closes standard input."""
    saved = os.dup(0)
    writers = []

    def connect(content: bytes | Path | None) -> None:
        if content is None:
            os.close(0)
            return
        if isinstance(content, Path):
            source = os.open(content, os.O_RDONLY)
        else:
            source, target = os.pipe()
            pipe = os.fdopen(target, "wb", buffering=0)
            writers.append(threading.Thread(target=lambda: (pipe.write(content), pipe.close()), daemon=True))
            writers[-1].start()
        os.dup2(source, 0)
        os.close(source)

    yield connect
    os.dup2(saved, 0)
    os.close(saved)


# ---- Standard input and pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input(standard_input: Callable, name: str, compress: Callable[[bytes], bytes]) -> None:
    standard_input(compress(LINES))
    assert documents(name) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("pipe", LINES, DOCUMENTS),
        ("a.jsonl", LINES, DOCUMENTS),
        ("a.txt", b"a\nb", ["a\nb"]),
        ("a.txt.gz", gzip.compress(b"a\nb", mtime=0), ["a\nb"]),
    ],
)
def test_named_pipe(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True)
    writer.start()
    assert documents(tmp_path / name) == expected
    writer.join()


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for names in (["-", "/dev/stdin"], [tmp_path / "pipe"] * 2):
        with pytest.raises(UserError, match="named twice"):
            find_inputs(names)


def test_commands_read_standard_input(
    standard_input: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    text = "".join(f"{number} words and more words\n<|end|>\n" for number in range(300))
    options = ["--input", "-", "--input-format", "text", "--document-separator", r"<|end|>\n"]
    standard_input(text.encode())
    prefix = str(tmp_path / "tokenizer")
    monkeypatch.setattr(sys, "argv", ["x", *options, "--vocab-size", "300", "--output-prefix", prefix])
    train_tokenizer.main()
    standard_input(text.encode())
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.model"]
    monkeypatch.setattr(sys, "argv", ["x", *options, *model, "--workers", "1", "--output-prefix", str(tmp_path / "a")])
    preprocess_data.main()
    processor = SentencePieceProcessor(model_file=f"{prefix}.model")
    expected = [token for part in text.split("<|end|>\n") for token in processor.encode(part)]
    assert open_tokens(tmp_path / "a_text_document").tolist() == expected
    assert "300 documents" in capfd.readouterr().out


# ---- Formats and names -----------------------------------------------------------------------------------------------


def test_format_is_given_or_told_by_the_suffix(tmp_path: Path) -> None:
    for name in ("a", "a.txt", "a.NDJSON", "a.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES))
        assert documents(tmp_path / name, "jsonl") == DOCUMENTS
        assert documents(tmp_path / name, "text") == [LINES.decode()]
        if "json" in name.lower():
            assert documents(tmp_path / name) == DOCUMENTS
        else:
            with pytest.raises(UserError, match="looks like JSON lines, but its name does not say so: pass --input-f"):
                documents(tmp_path / name)
    for text in ("{", '["a"]\n', "[" * 100_000, "1"):
        (tmp_path / "a").write_text(text)
        assert documents(tmp_path / "a") == [text]


# ---- Escapes of the separator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        (r"\n\n", "\n\n"),
        ("<|endoftext|>", "<|endoftext|>"),
        (r"\t\r\f\0\\n", "\t\r\f\0\\n"),
        (r"\x1e\u2029", "\x1e\u2029"),
        ("\n", "\n"),
    ],
)
def test_escapes(text: str, separator: str) -> None:
    assert unescape(text) == separator


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


# ---- Shards ----------------------------------------------------------------------------------------------------------


def write(path: Path, texts: Sequence[str]) -> Path:
    """Write documents in the format that the path's suffix tells."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix == ".txt":
        path.write_text("<sep>".join(texts), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


NAMES = ("a.jsonl", "a.parquet", "a.txt", "a.jsonl.gz", "hidden-gzip.jsonl")


@given(
    files=st.lists(st.tuples(st.sampled_from(NAMES), st.lists(TEXT, max_size=12)), min_size=1, max_size=4),
    count=st.integers(1, 9),
)
def test_shards_hold_all_documents_in_order(tmp_path: Path, files: list[tuple[str, list[str]]], count: int) -> None:
    paths = [write(tmp_path / f"{number}-{name}", texts) for number, (name, texts) in enumerate(files)]
    for path in paths:
        if "hidden" in path.name:
            path.write_bytes(gzip.compress(path.read_bytes()))
    separator = "<sep>" if any(path.suffix == ".txt" for path in paths) else None
    inputs = find_inputs(paths, separator=separator)
    parts = [take_shard(inputs, Shard(index, count)) for index in range(count)]
    assert [text for part in parts for text in texts_of(part)] == texts_of(inputs)
