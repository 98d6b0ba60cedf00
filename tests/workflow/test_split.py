"""The documents that are held out from training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.data.indexed_dataset import IndexedDatasetWriter
from maskmoe.errors import UserError
from maskmoe.workflow.split import choose_split


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
