"""The documents that are held out from training."""

import contextlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.comparison.held_out import check_text, choose_split
from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.errors import UserError


def write_dataset(prefix, lengths):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.zeros(length, np.uint16))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(16, 64))
def test_split_leaves_a_sample_to_both_parts(tmp_path_factory, lengths, seq_length):
    prefix = tmp_path_factory.mktemp("split") / "data"
    write_dataset(prefix, lengths)
    try:
        split = choose_split(prefix, seq_length)
    except UserError:
        assert all(min(sum(lengths[:cut]), sum(lengths[cut:])) <= seq_length for cut in range(1, len(lengths)))
        return
    train, held_out = lengths[: split.train_documents], lengths[split.train_documents :]
    assert split.flag == f"{len(train)},{len(held_out)},0"
    assert min(sum(train), sum(held_out)) > seq_length
    assert sum(held_out[1:]) < max(seq_length + 1, 0.02 * sum(lengths))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([5000], "the input is a single document"), ([20, 20], "40 tokens in 2 documents are too few")],
)
def test_text_that_cannot_be_split_is_refused(tmp_path, lengths, message):
    write_dataset(tmp_path / "data", lengths)
    with pytest.raises(UserError, match=message):
        choose_split(tmp_path / "data", 32)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["word " * 5000], "the input is a single document"),
        (["word " * 5000, ""], "the input is a single document"),
        (["word", "word"], "8 bytes in 2 documents are too few .* --seq-length 256"),
        ([], "0 bytes in 0 documents"),
        (["word " * 500, "word " * 500], None),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_is_checked_before_it_becomes_a_dataset(tmp_path, texts, reason, suffix):
    paths = [tmp_path / f"{number}{suffix}" for number in range(max(1, len(texts)))]
    for path, text in itertools.zip_longest(paths, texts, fillvalue=""):
        path.write_text(json.dumps({"text": text}) if suffix == ".jsonl" and texts else text)
    with pytest.raises(UserError, match=reason) if reason else contextlib.nullcontext():
        check_text(paths, "text", 256)
