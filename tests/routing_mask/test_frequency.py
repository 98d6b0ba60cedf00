import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.open_files import few_open_files

from maskmoe.data.indexed_dataset import IndexedDatasetWriter
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask import TokenFrequency, count_token_frequency
from maskmoe.routing_mask import frequency as frequency_module
from maskmoe.routing_mask.frequency import parse_data_path
from maskmoe.routing_mask.sealed_tensors import seal

TOKENIZER = TokenizerRecord("SentencePieceTokenizer", "text.model", sha256="a" * 64, vocab_size=100, eod_id=0)


def write_dataset(prefix: Path, ids, dtype=np.uint16, tokenizer=None) -> str:
    with IndexedDatasetWriter(prefix, dtype, tokenizer) as writer:
        for document in np.array_split(np.asarray(ids), 3):
            writer.add_document(document)
    return str(prefix)


def random_ids(seed: int, size: int, vocab_size: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=size)


@pytest.fixture
def small_spans(monkeypatch):
    """Make spans and blocks of a few hundred ids, so that small datasets have many spans and blocks."""
    monkeypatch.setattr(frequency_module, "_MIN_SPAN_BYTES", 1000)
    monkeypatch.setattr(frequency_module, "_BLOCK_IDS", 128)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_counts_equal_numpy(tmp_path, small_spans, dtype):
    ids = random_ids(0, 12345)
    frequency = count_token_frequency([write_dataset(tmp_path / "text", ids, dtype)], 100, workers=1)
    assert frequency.counts.dtype == np.int64
    assert frequency.counts.tolist() == [np.bincount(ids, minlength=100).tolist()]
    assert frequency.num_tokens == 12345


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_counts_of_a_dataset_that_megatron_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    ids = random_ids(1, 3000)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    for document in np.split(ids, 3):
        builder.add_document(torch.from_numpy(document), [400, 600])
    builder.finalize(str(tmp_path / "text.idx"))
    frequency = count_token_frequency([str(tmp_path / "text")], 100)
    assert frequency.counts[0].tolist() == np.bincount(ids, minlength=100).tolist()
    assert frequency.datasets == (
        {
            "name": "text",
            "num_tokens": 3000,
            "idx_sha256": hashlib.sha256((tmp_path / "text.idx").read_bytes()).hexdigest(),
            "bin_bytes": 6000,
        },
    )


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(frequency_module, "_MIN_SPAN_BYTES", 10000)
    prefixes = [write_dataset(tmp_path / name, random_ids(seed, 20000)) for seed, name in enumerate("ab")]
    alone = count_token_frequency(prefixes, 100, workers=1)
    together = count_token_frequency(prefixes, 100, workers=2)
    assert together.digest == alone.digest
    with pytest.raises(UserError, match="at least 1 worker"):
        count_token_frequency(prefixes, 100, workers=0)


def test_few_files_are_open_at_a_time(tmp_path):
    prefixes = [write_dataset(tmp_path / str(number), [number] * 3) for number in range(40)]
    with few_open_files():
        frequency = count_token_frequency(prefixes, 40, workers=1)
    assert frequency.counts.tolist() == (3 * np.eye(40, dtype=int)).tolist()


def test_unweighted_datasets_add_up(tmp_path):
    parts = [random_ids(0, 100), random_ids(1, 5000), random_ids(2, 33)]
    prefixes = [write_dataset(tmp_path / str(index), ids) for index, ids in enumerate(parts)]
    frequency = count_token_frequency(prefixes, 100)
    assert frequency.occurrences.tolist() == np.bincount(np.concatenate(parts), minlength=100).tolist()
    assert frequency.weights == (None, None, None)


def test_blend_weights_count_tokens_whatever_the_sizes_of_the_datasets(tmp_path):
    small = write_dataset(tmp_path / "small", [1, 1, 2, 3])
    large = write_dataset(tmp_path / "large", [4] * 300 + [1] * 96)
    frequency = count_token_frequency(["30", small, "10", large], 5)
    assert frequency.counts.tolist() == [[0, 2, 1, 1, 0], [0, 96, 0, 0, 300]]  # exact, unblended
    # 400 tokens in all: 300 from the small dataset, 100 from the large one.
    np.testing.assert_allclose(frequency.occurrences, [0, 150 + 100 * 96 / 396, 75, 75, 100 * 300 / 396])
    rescaled = count_token_frequency(["0.75", small, "0.25", large], 5)
    np.testing.assert_allclose(rescaled.occurrences, frequency.occurrences)


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


@pytest.mark.parametrize(
    ("dtype", "bad_id"), [(np.uint16, 100), (np.int32, -1), (np.int32, 2**31 - 1), (np.int64, 2**60)]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_id_outside_the_vocabulary_is_reported_with_its_position(tmp_path, small_spans, dtype, bad_id, workers):
    good = write_dataset(tmp_path / "good", random_ids(0, 5000), dtype)
    ids = random_ids(1, 5000)
    ids[[3210, 3211, 4999]] = bad_id
    bad = write_dataset(tmp_path / "bad", ids, dtype)
    with pytest.raises(UserError, match=rf"bad: token 3210 has id {bad_id}, outside the vocabulary of 100 ids"):
        count_token_frequency([good, bad], 100, workers=workers)


def test_datasets_without_tokens_or_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        count_token_frequency([str(tmp_path / "missing")], 100)
    with pytest.raises(UserError, match="empty holds no tokens"):
        count_token_frequency([write_dataset(tmp_path / "empty", [])], 100)
    truncated = write_dataset(tmp_path / "truncated", random_ids(0, 100))
    (tmp_path / "truncated.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="truncated"):
        count_token_frequency([truncated], 100)
    with pytest.raises(UserError, match="--vocab-size"):
        count_token_frequency([truncated], 0)


def test_tokenizers_must_agree(tmp_path):
    ids = random_ids(0, 100)
    first = write_dataset(tmp_path / "first", ids, tokenizer=TOKENIZER)
    renamed = write_dataset(tmp_path / "renamed", ids, tokenizer=replace(TOKENIZER, model="other-name.model"))
    unknown = write_dataset(tmp_path / "unknown", ids)
    other = write_dataset(tmp_path / "other", ids, tokenizer=replace(TOKENIZER, sha256="b" * 64))
    assert count_token_frequency([first, renamed, unknown], 100).tokenizer == TOKENIZER
    assert count_token_frequency([unknown], 100).tokenizer is None
    with pytest.raises(
        UserError, match=r"different tokenizers: .*first with .*aaaaaaaaaaaa.*, .*other with .*bbbbbbbbbbbb"
    ):
        count_token_frequency([first, unknown, other], 100)
    with pytest.raises(UserError, match=r"--vocab-size is 120, .*first was made with .*100 ids"):
        count_token_frequency([first], 120)


def test_save_and_load(tmp_path):
    prefixes = [
        write_dataset(tmp_path / name, random_ids(seed, 500), tokenizer=TOKENIZER) for seed, name in enumerate("ab")
    ]
    frequency = count_token_frequency(["0.3", prefixes[0], "0.7", prefixes[1]], 100)
    path = tmp_path / "counts.safetensors"
    frequency.save(path)
    loaded = TokenFrequency.load(path)
    assert loaded.counts.tobytes() == frequency.counts.tobytes()
    assert (loaded.weights, loaded.datasets, loaded.tokenizer) == ((0.3, 0.7), frequency.datasets, TOKENIZER)
    assert loaded.digest == frequency.digest
    assert replace(frequency, weights=(0.5, 0.5)).digest != frequency.digest


def test_name_of_a_dataset_that_is_not_utf8(tmp_path):
    frequency = count_token_frequency([write_dataset(tmp_path / "n\udcff", [1, 2, 3])], 100)
    frequency.save(tmp_path / "counts.safetensors")
    loaded = TokenFrequency.load(tmp_path / "counts.safetensors")
    assert loaded.datasets == frequency.datasets
    assert loaded.datasets[0]["name"] == r"n\xff"


def test_altered_counts_are_refused(tmp_path):
    path = tmp_path / "counts.safetensors"
    frequency = count_token_frequency([write_dataset(tmp_path / "text", random_ids(0, 500))], 100)
    frequency.save(path)
    content = bytearray(path.read_bytes())
    content[-800] += 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="altered or damaged"):
        TokenFrequency.load(path)
    with pytest.raises(UserError, match="contradict"):
        replace(frequency, counts=frequency.counts + 1)
    tensors, record = frequency.parts()
    for forged_tensors, forged_record, message in (
        ({"counts": frequency.counts + 1}, record, "contradict"),
        (tensors, record | {"datasets": [{"name": "[]"}]}, "lacks parts"),
        (tensors, record | {"x": 1}, "other fields"),
    ):
        save_file(forged_tensors, path, metadata=seal("token frequency", forged_tensors, forged_record))
        with pytest.raises(UserError, match=rf"counts\.safetensors.*{message}"):
            TokenFrequency.load(path)
