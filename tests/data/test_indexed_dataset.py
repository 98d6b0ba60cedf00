"""Compares the dataset format with Megatron-Core's own reader and writer."""

import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.data.indexed_dataset import open_tokens, optimal_dtype, parse_data_path, read_index, read_tokenizer_record
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError

# Lists of documents, which are lists of sequences, which are lists of token ids.
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=5), max_size=3), max_size=8)
DTYPES = st.sampled_from([np.uint16, np.int32, np.int64])
RECORD = TokenizerRecord("SentencePieceTokenizer", "t.model", "ab" * 32, 600, 2)


def flatten(nested: list[list]) -> list:
    return list(chain.from_iterable(nested))


def write(
    prefix: Path, documents: list[list[list[int]]], dtype: type, tokenizer: TokenizerRecord | None = None
) -> None:
    with IndexedDatasetWriter(prefix, dtype, tokenizer) as writer:
        for sequences in documents:
            lengths = np.array([len(sequence) for sequence in sequences], np.int64)
            writer.add_sequences(np.array(flatten(sequences), dtype), lengths, np.array([len(sequences)]))


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        builder.add_document(flatten(sequences), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def content(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@given(documents=DOCUMENTS, dtype=DTYPES)
def test_same_bytes_as_megatron(tmp_path: Path, documents: list[list[list[int]]], dtype: type) -> None:
    write(tmp_path / "ours", documents, dtype)
    write_with_megatron(tmp_path / "theirs", documents, dtype)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")

    index = read_index(tmp_path / "theirs")
    sequences = flatten(documents)
    assert index.dtype == dtype
    assert index.sequence_lengths.tolist() == [len(sequence) for sequence in sequences]
    assert (len(index.document_indices) - 1, len(index.sequence_lengths)) == (len(documents), len(sequences))
    if index.num_tokens:
        assert open_tokens(tmp_path / "theirs").tolist() == flatten(sequences)


@given(documents=st.lists(st.lists(st.integers(0, 60000), max_size=5), max_size=20), batch=st.integers(1, 7))
def test_documents_in_batches(tmp_path: Path, documents: list[list[int]], batch: int) -> None:
    with IndexedDatasetWriter(tmp_path / "batches", np.uint16) as writer:
        for begin in range(0, len(documents), batch):
            part = documents[begin : begin + batch]
            writer.add_documents(np.array(flatten(part), np.uint16), np.array([len(document) for document in part]))
    write(tmp_path / "single", [[document] if document else [] for document in documents], np.uint16)
    assert content(tmp_path / "batches") == content(tmp_path / "single")


def test_reads_multimodal_index(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/modes.bin", np.int32, multimodal=True)
    builder.add_document([5, 6, 7], [1, 2], [0, 1])
    builder.finalize(f"{tmp_path}/modes.idx")
    assert open_tokens(tmp_path / "modes").tolist() == [5, 6, 7]


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 200_000])
def test_optimal_dtype(vocab_size: int) -> None:
    assert optimal_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_tokenizer_record(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1]]], np.uint16, RECORD)
    assert read_tokenizer_record(tmp_path / "a") == RECORD
    write(tmp_path / "a", [[[1]]], np.uint16)
    assert read_tokenizer_record(tmp_path / "a") is None
    (tmp_path / "a.tokenizer.json").write_text('{"type": "x"}')
    with pytest.raises(UserError, match=r"a\.tokenizer\.json is not a tokenizer record"):
        read_tokenizer_record(tmp_path / "a")


def test_failed_writing_keeps_the_earlier_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]]], np.uint16, RECORD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write_an_id_that_does_not_fit() -> None:
        with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
            writer.add_documents(np.array([3, 70000]), np.array([1, 1]))

    with pytest.raises(ValueError, match=r"3\.\.70000 do not fit uint16"):
        write_an_id_that_does_not_fit()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("lengths", [[1, 1], [4]])
def test_lengths_must_match_tokens(tmp_path: Path, lengths: list[int]) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        with pytest.raises(ValueError, match="there are 3 tokens"):
            writer.add_sequences(np.arange(3), np.array(lengths), np.array([len(lengths)]))
        with pytest.raises(ValueError, match="there are 3 tokens"):
            writer.add_documents(np.arange(3), np.array(lengths))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose an existing"), IndexedDatasetWriter(tmp_path / "no" / "a", np.uint16):
        pass


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:offset] + data + old[offset + len(data) :])


# The index below: header 34 bytes, lengths at 34 (2 x int32), offsets at 42 (2 x int64), documents at 58 (3 x int64).
DAMAGES = {
    r"a\.bin does not exist$": lambda folder: (folder / "a.bin").unlink(),
    r"a\.idx does not exist$": lambda folder: (folder / "a.idx").unlink(),
    r"a\.bin has 9 bytes, but .*a\.idx describes 10": lambda folder: cut(folder / "a.bin", 9),
    r"a\.bin has 0 bytes, but .*a\.idx describes 10": lambda folder: cut(folder / "a.bin", 0),
    r"a\.idx has 20 bytes, fewer than the 34": lambda folder: cut(folder / "a.idx", 20),
    r"a\.idx has 80 bytes, but its header describes 82": lambda folder: cut(folder / "a.idx", 80),
    r"a\.idx is not an index": lambda folder: overwrite(folder / "a.idx", 0, b"X"),
    r"a\.idx has format version 2": lambda folder: overwrite(folder / "a.idx", 9, b"\x02"),
    r"a\.idx has dtype code 6": lambda folder: overwrite(folder / "a.idx", 17, b"\x06"),
    r"a\.idx contradicts itself": lambda folder: overwrite(folder / "a.idx", 34, struct.pack("<i", 4)),
    r"a\.idx contradicts itself \(": lambda folder: overwrite(folder / "a.idx", 66, struct.pack("<q", 3)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_datasets(tmp_path: Path, message: str) -> None:
    write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]], np.uint16)
    DAMAGES[message](tmp_path)
    for read in (read_index, open_tokens):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a")


def test_suffix_given_as_prefix(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1]]], np.uint16)
    with pytest.raises(UserError, match=r"give the prefix, without \.bin or \.idx"):
        read_index(tmp_path / "a.bin")


def test_no_tokens(tmp_path: Path) -> None:
    write(tmp_path / "a", [[]], np.uint16)
    with pytest.raises(UserError, match="holds no tokens"):
        open_tokens(tmp_path / "a")


PREFIXES = ["data", "books ", " web"]


WEIGHTS = ["7", "0.3", "1e2"]


@given(
    st.lists(st.sampled_from(PREFIXES + WEIGHTS), min_size=1, max_size=5).filter(lambda items: len(items) % 2)
    | st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=6)
    | st.lists(st.tuples(st.sampled_from(WEIGHTS), st.sampled_from(PREFIXES + WEIGHTS)), min_size=1, max_size=3).map(
        lambda pairs: [item for pair in pairs for item in pair]
    )
)
def test_data_path_is_parsed_as_megatron_does(items):
    megatron = pytest.importorskip("megatron.core.datasets.utils")
    prefixes, weights = megatron.get_blend_from_list(items)
    assert parse_data_path(items) == (list(prefixes), weights or [None] * len(prefixes))


@pytest.mark.parametrize("items", [[], ["7", "data", "web", "data"], ["data", "7", "7", "data"]])
@pytest.mark.parametrize("number", ["7", "nan", "inf", "0", "-1"])
def test_data_paths_without_a_clear_meaning_are_refused(items, number):
    with pytest.raises(UserError, match="--data-path"):
        parse_data_path([number if item == "7" else item for item in items])
    if number != "7":
        with pytest.raises(UserError, match="not a positive number"):
            parse_data_path(["1", "data", number, "web"])
