"""Input that cannot be used is refused by one line that names it."""

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.datasets import write_documents

from maskmoe.data.dataset_writing import merge_datasets
from maskmoe.data.documents import read_blocks, read_documents
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.data.inputs import Input, Shard, find_inputs, take_shard, unescape
from maskmoe.data.preprocess import preprocess
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import count_token_frequency, merge_token_frequencies


def refused(read: Callable[..., object], *arguments: object, **settings: object) -> str:
    """Return the error of a reader, which is one short line."""
    with pytest.raises(UserError) as caught:
        read(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 6000
    return message


def documents(path: Path) -> list[str]:
    return list(read_documents([path]))


def separated(path: Path) -> list[str]:
    return [text for block in read_blocks(find_inputs([path], separator="--")) for text in block.documents(["text"])[0]]


LINES = b'{"text": "\xc3\xa9"}\n\n{"text"\t:""}\n'
BAD_LINES = (
    *(b'{"text": "a"', b"[1]", b'{"body": "a", "id": 1}', b'{"text": 5}', b'{"text": "\\ud800"}'),
    *(b'{"text": "\xff"}', b'{"text": ' + b"[" * 100_000),
)
COMPRESSED = {".gz": gzip.compress(bytes(range(32, 127)) * 1000), ".zst": zstandard.compress(bytes(1000))}
DAMAGED = [
    (f"a.txt{suffix}", data) for suffix, all in COMPRESSED.items() for data in (all[: len(all) // 2], b"x" + all)
]


@pytest.mark.parametrize(
    ("read", "name", "content", "where"),
    [
        *((documents, "a.jsonl", LINES + line + b'\n{"text": "b"}\n', "line 4: ") for line in BAD_LINES),
        (documents, "a.txt", b"\xef\xbb\xbfone\ntwo\nth\xffee\n", "line 3: invalid UTF-8"),
        (separated, "a.txt", b"one\n--two\n--th\xffree\n", "line 3: invalid UTF-8"),
        *((documents, name, data, "damaged or truncated") for name, data in DAMAGED),
    ],
)
def test_bad_bytes(tmp_path: Path, read: Callable, name: str, content: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(read, tmp_path / name)
    assert name in message
    assert where in message


INVALID = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"], pa.binary()).buffers())


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"body": ["a"], "id": [1]}),
        *(pa.table({"text": column}) for column in ([1], [b"a"], [["a"]], pa.nulls(2), ["a", None], INVALID)),
        pa.table({"text": pa.DictionaryArray.from_arrays([0] * 9 + [1], ["a", None]).dictionary_decode()}),
        pa.table([["a"], ["b"]], names=["text", "text"]),
    ],
)
def test_columns_without_text(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    assert str(tmp_path / "a.parquet") in refused(documents, tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("missing.jsonl", (), "missing.jsonl"),
        ("x" * 5000, (), "too long"),
        ("a\0b", (), "null"),
        ("folder", (), "folder"),
        ("a.jsonl", (None, "x"), "--document-separator"),
        ("a.jsonl", ("parquet",), "a.jsonl"),
        *((device, (), device) for device in ("/dev/zero", "/dev/full", "/dev/null")),
    ],
)
def test_unusable_names(tmp_path: Path, name: str, options: tuple, named: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "folder").mkdir()
    path = name if name.startswith("/") else f"{tmp_path}/{name}"
    assert named in refused(lambda: list(read_blocks(find_inputs([path], *options))))


def test_bad_words() -> None:
    for text in ("", "a\\", r"\x1", r"\ud800", r"\N{DASH}", "\udcff"):
        assert "--document-separator" in refused(unescape, text)
    for text in ("2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", " 0/2", "٠/٢"):
        assert "I/N" in refused(Shard.parse, text)
    for source in (Input("pipe", "jsonl", None), Input("-", "jsonl", 100)):
        assert "--shard" in refused(take_shard, [source], Shard(0, 2))


@pytest.mark.parametrize(
    "settings",
    [
        '{"eos_token": "<nowhere>"}',
        '{"pad_token": {"content": "<pad>"}}',
        '{"additional_special_tokens": ["<end>", "<x>"]}',
        '{"extra_special_tokens": {"image_token": "<x>"}}',
        '{"added_tokens_decoder": {"500": {"content": "<x>"}}}',
        '{"added_tokens_decoder": 5}',
        '{"eos_token": 5}',
        '{"split_special_tokens": true}',
        '{"eos_token": {"id": 2}}',
        "{",
        "[]",
    ],
)
def test_settings_of_a_tokenizer(huggingface_folder: Path, tmp_path: Path, settings: str) -> None:
    shutil.copy(huggingface_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    assert "tokenizer" in refused(load_tokenizer, "HuggingFaceTokenizer", tmp_path)


def test_models_of_tokenizers(huggingface_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no model")
    for kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer"):
        assert "missing" in refused(load_tokenizer, kind, tmp_path / "missing")
        assert "text" in refused(load_tokenizer, kind, tmp_path / "text")
    assert "NoTokenizer" in refused(load_tokenizer, "NoTokenizer", tmp_path)
    settings = json.loads((huggingface_folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert "tokenizer.json" in refused(load_tokenizer, "HuggingFaceTokenizer", tmp_path)


@pytest.mark.parametrize("eod_id", [500, 70_000, None])
def test_end_of_documents_beyond_the_vocabulary(
    jsonl: Callable, huggingface_folder: Path, tmp_path: Path, eod_id
) -> None:
    """The `tokenizer.json` has 500 ids; without settings it names no end."""
    settings = json.loads((huggingface_folder / "tokenizer.json").read_text(encoding="utf-8"))
    (end,) = (token for token in settings["added_tokens"] if token["content"] == "<end>")
    if eod_id is not None:
        end["id"] = settings["model"]["vocab"]["<end>"] = eod_id
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    arguments = [jsonl("a.jsonl", ["a"])], "HuggingFaceTokenizer", tmp_path, tmp_path / "out"
    assert "end-of-text" in refused(preprocess, *arguments, append_eod=True)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("texts", "vocab_size", "named"),
    [
        ([], 500, "no text"),
        (["", "\n\n", "▅▅\n▅"], 500, "no text"),
        (["\0\0\n\0"], 500, "--vocab-size"),
        (["hello"], 500, "--vocab-size"),
        (["hello"], 100, "--vocab-size"),
    ],
)
def test_texts_that_do_not_suit_the_size(texts: list[str], vocab_size: int, named: str, model_type: str) -> None:
    assert named in refused(train_tokenizer, texts, vocab_size=vocab_size, model_type=model_type, num_threads=1)


# The index of the dataset: header 34 bytes, lengths at 34 (2 x int32), offsets at 42 (2 x int64), documents at 58.
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *((suffix, lambda data, size=size: data[:size]) for suffix, size in (("bin", 9), ("bin", 0), ("idx", 20))),
        ("idx", lambda data: data[:80]),
        *(
            ("idx", lambda data, at=at, new=new: data[:at] + new + data[at + len(new) :])
            for at, new in ((0, b"X"), (9, b"\2"), (17, b"\6"), (34, struct.pack("<i", 4)), (66, struct.pack("<q", 3)))
        ),
        *((suffix, lambda data: None) for suffix in ("bin", "idx")),
    ],
)
def test_damaged_datasets(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes | None]) -> None:
    path = write_documents(tmp_path / "a", [[1, 2, 3], [4, 5]]).with_suffix(f".{suffix}")
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert f"a.{suffix}" in refused(open_tokens, tmp_path / "a")


def record(**changes: object) -> TokenizerRecord:
    values = {"type": "HuggingFaceTokenizer", "model": "a", "sha256": "0" * 64, "vocab_size": 10, "eod_id": None}
    return TokenizerRecord(**values | changes)


@pytest.mark.parametrize(
    "second",
    [
        {"dtype": np.int32, "tokenizer": record()},
        {"tokenizer": record(sha256="1" * 64)},
        {"tokenizer": record(eod_id=1)},
        {"tokenizer": None},
    ],
)
def test_datasets_that_differ_are_not_joined(tmp_path: Path, second: dict) -> None:
    names = [str(write_documents(tmp_path / "a", [[1]], tokenizer=record()))]
    names.append(str(write_documents(tmp_path / "b", [[2]], **second)))
    assert all(name in refused(merge_datasets, names, f"{tmp_path}/merged") for name in names)
    # The name of the tokenizer's file does not matter.
    names[1] = str(write_documents(tmp_path / "c", [[2]], tokenizer=record(model="other")))
    merge_datasets(names, f"{tmp_path}/merged")
    assert "--force" in refused(merge_datasets, names, f"{tmp_path}/merged")
    assert "input" in refused(merge_datasets, names, names[0], force=True)
    assert "twice" in refused(merge_datasets, [names[0], f"{tmp_path}/./a"], f"{tmp_path}/other")


def test_datasets_that_cannot_be_merged(tmp_path: Path) -> None:
    empty = str(write_documents(tmp_path / "empty", []))
    cut = write_documents(tmp_path / "cut", [[1, 2]])
    cut.with_suffix(".bin").write_bytes(b"1")
    for shard in ("lost-00000-of-00004", "lost-00002-of-00004", "two-00000-of-00004", "two-00000-of-00002"):
        write_documents(tmp_path / f"{shard}_text_document", [[1]])
    shards = [sorted(map(str, tmp_path.glob(f"{text}-*.idx"))) for text in ("lost", "two")]
    for names in (["nothing"], [empty, "nothing"], *shards, [empty], [empty, str(cut)]):
        refused(merge_datasets, names, f"{tmp_path}/merged")
        assert not list(tmp_path.glob("*merged*"))
    assert "lost-00001-of-00004_text_document" in refused(merge_datasets, shards[0], f"{tmp_path}/merged")


def test_counts_that_cannot_be_added_up(tmp_path: Path) -> None:
    def count(name: str, *data: str, vocab_size: int = 10, **tokenizer: object) -> Path:
        prefix = str(write_documents(tmp_path / name, [[1]], tokenizer=record(vocab_size=vocab_size, **tokenizer)))
        count_token_frequency([*data, prefix], vocab_size).save(tmp_path / f"{name}.counts")
        return tmp_path / f"{name}.counts"

    first, weighted = count("a"), count("b", "0.5", str(tmp_path / "a"), "2")
    joined = tmp_path / "joined"
    merge_token_frequencies([first, count("c")]).save(joined)
    for other in (first, joined, weighted, count("d", vocab_size=11), count("e", sha256="1" * 64)):
        assert "counts" in refused(merge_token_frequencies, [first, other])
