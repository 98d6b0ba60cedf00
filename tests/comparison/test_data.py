"""The dataset of a suite: from text or existing, with further held-out texts, and its digests."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import write_documents

from maskmoe.comparison.data import Dataset, choose_split
from maskmoe.comparison.suite import DataSection
from maskmoe.errors import UserError


def section(**values):
    return DataSection.model_construct(**{"vocab_size": "300", **values})


def test_text_becomes_a_dataset_with_its_tokenizer_and_counts(tmp_path, texts):
    text, _ = texts
    data = Dataset.of(section(input=(str(text),), held_out={"other": str(text)}), tmp_path / "data", 16)
    steps = {step.name: step for step in data.steps()}
    assert list(steps) == ["tokenizer", "dataset", "other", "count"]
    assert "--shuffle-seed" in steps["dataset"].command
    assert "--shuffle-seed" not in steps["other"].command
    assert data.held_out_flags("other")["split"] == ("0,1,0",)
    before = data.settings
    text.write_text("another text")
    assert data.settings != before


def test_an_existing_dataset_is_only_counted(tmp_path):
    prefix = str(write_documents(tmp_path / "a", [[0] * 9]))
    flags = {
        "data-path": ("0.3", prefix, "0.7", "/b"),
        "split": ("9,1,0",),
        "tokenizer-type": ("HuggingFaceTokenizer",),
        "tokenizer-model": ("/model",),
    }
    data = Dataset.of(section(flags=flags), tmp_path, 16)
    assert [step.name for step in data.steps()] == ["count"]
    assert data.settings["files"]["/b.idx"] is None
    assert data.settings["files"][f"{prefix}.bin"]
    assert data.flags == flags
    with pytest.raises(UserError, match="split"):
        Dataset.of(section(flags={"data-path": ("/a",)}), tmp_path, 16)


def test_only_training_needs_the_text(tmp_path):
    data = Dataset.of(section(), tmp_path, 16)
    with pytest.raises(UserError, match="--input"):
        data.check()


def test_digests_tell_texts_apart(tmp_path, monkeypatch):
    class Counts:
        digest = "counts"

    monkeypatch.setattr("maskmoe.comparison.data.TokenFrequency.load", lambda path: Counts())
    data = Dataset(tmp_path, "300", 16, held_out={"other": tmp_path / "other.jsonl"})
    (tmp_path / "other_text_document.idx").write_bytes(b"index")
    assert data.digests() is None  # the counts are not made yet
    data.token_frequency.touch()
    assert data.digests() == {"training": "counts", "other": hashlib.sha256(b"index").hexdigest()}
    existing = Dataset(tmp_path, "300", 16, existing={"split": ("99,1,0",), "data-path": ("p",)})
    assert existing.digests() == {"training": "counts", "training split": "99,1,0"}


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(16, 64))
def test_split_leaves_a_sample_to_both_parts(tmp_path_factory, lengths, seq_length):
    prefix = tmp_path_factory.mktemp("split") / "data"
    write_documents(prefix, ([0] * length for length in lengths))
    try:
        split = choose_split(prefix, seq_length)
    except UserError:
        assert all(min(sum(lengths[:cut]), sum(lengths[cut:])) <= seq_length for cut in range(1, len(lengths)))
        return
    num_train, num_held_out, _ = map(int, split.split(","))
    train, held_out = lengths[:num_train], lengths[num_train:]
    assert len(held_out) == num_held_out
    assert min(sum(train), sum(held_out)) > seq_length
    assert sum(held_out[1:]) < max(seq_length + 1, 0.02 * sum(lengths))
