import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.datasets import covering_ids, frequency_of, write_documents
from support.system import few_open_files

from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask import frequency as frequency_module
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import (
    FrequencyBands,
    TokenFrequency,
    count_token_frequency,
    expected_expert_load,
    heaviest_shares,
    overloading_ids,
)
from maskmoe.routing_mask.mask import HashLayers
from maskmoe.routing_mask.sealed_tensors import seal

TOKENIZER = TokenizerRecord("SentencePieceTokenizer", "text.model", sha256="a" * 64, vocab_size=100, eod_id=0)


def write_dataset(prefix: Path, ids, dtype=np.uint16, tokenizer=None) -> str:
    """Write a dataset of three documents; return its prefix."""
    return str(write_documents(prefix, np.array_split(np.asarray(ids), 3), dtype, tokenizer))


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
    index_digest = hashlib.sha256((tmp_path / "text.idx").read_bytes()).hexdigest()
    sizes = {"num_tokens": 12345, "bin_bytes": 12345 * np.dtype(dtype).itemsize}
    assert frequency.datasets == ({"name": "text", "idx_sha256": index_digest} | sizes,)
    assert frequency.num_tokens == 12345


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(frequency_module, "_MIN_SPAN_BYTES", 10000)
    prefixes = [write_dataset(tmp_path / name, random_ids(seed, 20000)) for seed, name in enumerate("ab")]
    alone = count_token_frequency(prefixes, 100, workers=1)
    together = count_token_frequency(prefixes, 100, workers=2)
    assert together.digest == alone.digest


def test_few_files_are_open_at_a_time(tmp_path):
    prefixes = [write_dataset(tmp_path / str(number), [number] * 3) for number in range(40)]
    with few_open_files():
        frequency = count_token_frequency(prefixes, 40, workers=1)
    assert frequency.counts.tolist() == (3 * np.eye(40, dtype=int)).tolist()


def test_blend_weights_count_tokens_whatever_the_sizes_of_the_datasets(tmp_path):
    small = write_dataset(tmp_path / "small", [1, 1, 2, 3])
    large = write_dataset(tmp_path / "large", [4] * 300 + [1] * 96)
    frequency = count_token_frequency(["30", small, "10", large], 5)
    assert frequency.counts.tolist() == [[0, 2, 1, 1, 0], [0, 96, 0, 0, 300]]  # exact, unblended
    # 400 tokens in all: 300 from the small dataset, 100 from the large one.
    np.testing.assert_allclose(frequency.occurrences, [0, 150 + 100 * 96 / 396, 75, 75, 100 * 300 / 396])
    rescaled = count_token_frequency(["0.75", small, "0.25", large], 5)
    np.testing.assert_allclose(rescaled.occurrences, frequency.occurrences)


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


def test_forged_counts_are_refused(tmp_path):
    path = tmp_path / "counts.safetensors"
    frequency = count_token_frequency([write_dataset(tmp_path / "text", random_ids(0, 500))], 100)
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


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50).filter(any))
def test_bands_are_the_shortest_prefixes_by_frequency(counts):
    occurrences = np.array(counts, dtype=float)

    band_of_id = FrequencyBands(occurrences).band_of_id

    # One id can fill several bands, and ids without occurrences are in the last band.
    for band, share in enumerate((0.4, 0.9)):
        assert set(np.flatnonzero(band_of_id <= band)) == covering_ids(counts, share)


@pytest.mark.parametrize("topk", [1, 2, 8])
def test_expected_load_against_a_loop(mask, zipf_frequency, topk):
    occurrences = zipf_frequency(200, 5000).occurrences
    expected = np.zeros((3, 10))
    for layer in range(3):
        for token, visible in enumerate(mask.visible_sets(layer)):
            expected[layer, visible] += occurrences[token] * min(topk, visible.sum()) / visible.sum()
    np.testing.assert_allclose(expected_expert_load(mask, occurrences, topk), expected)
    assert topk > 1 or expected.sum() == pytest.approx(3 * 5000)


def test_ids_that_make_balance_impossible():
    frequency = frequency_of([30, 5, 26, 5, 5, 5, 5, 5, 5, 9])
    hashed = build_routing_mask(MaskRecipe.from_preset("hash", 4, 1), frequency=frequency)
    assert overloading_ids(hashed, *heaviest_shares(hashed, frequency.occurrences, topk=1)).tolist() == [0, 2]
    balanced = build_routing_mask(MaskRecipe(4, 1, "balanced", 0.5, 2), frequency=frequency)
    assert overloading_ids(balanced, *heaviest_shares(balanced, frequency.occurrences, topk=1)).tolist() == []
    local = MaskRecipe(8, 1, "rank-local", 0.5, 2, expert_model_parallel_size=4)
    local_mask = build_routing_mask(local, frequency=frequency)
    assert overloading_ids(local_mask, *heaviest_shares(local_mask, frequency.occurrences, topk=1)).tolist() == [0, 2]
    # With k = 1, id 0 adds 11 of a load of 100 to both its experts. With k = 2, it adds 22 of 122.
    frequency = frequency_of([22, *[1] * 78])
    mask = build_routing_mask(MaskRecipe(8, 1, "balanced", 0.2, 2), frequency=frequency)
    assert overloading_ids(mask, *heaviest_shares(mask, frequency.occurrences, topk=1)).tolist() == []
    assert overloading_ids(mask, *heaviest_shares(mask, frequency.occurrences, topk=2)).tolist() == [0]


def test_ids_overload_experts_by_their_share_of_the_load_in_one_layer():
    """Id 0 has 12 of 100 occurrences, sees 2 of 16 experts in the hash layer and 8 in the other; all ids use both."""
    frequency = frequency_of([12, *[1] * 88])
    hashed = HashLayers(1, 2, "balanced")
    mask = build_routing_mask(MaskRecipe(16, 2, "balanced", 0.12, 8, hash_layers=hashed, topk=2), frequency=frequency)
    shares, visible = heaviest_shares(mask, frequency.occurrences, topk=2)
    assert (shares[0], visible[0]) == (pytest.approx(0.12), 2)
    assert overloading_ids(mask, *heaviest_shares(mask, frequency.occurrences, topk=2)).tolist() == []
