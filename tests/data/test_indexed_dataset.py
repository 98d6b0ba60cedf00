"""Compares the dataset format with Megatron-Core's own reader and writer."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from maskmoe.data.data_path import parse_data_path
from maskmoe.data.dataset_writing import IndexedDatasetWriter, optimal_dtype
from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.data.tokenizer_record import TokenizerRecord, read_tokenizer_record
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
