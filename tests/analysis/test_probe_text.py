"""The token ids of probe texts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.tokenizers import MegatronTokenizer
from support.datasets import write_documents
from support.small_series import VOCAB_SIZE

from maskmoe.analysis.probe_text import (
    DatasetText,
    read_pieces,
    split_sequences,
    spread_windows,
    windows_of,
)
from maskmoe.analysis.routing_statistics import SPLITS
from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.data.tokenizer import SentencePieceTokenizer
from maskmoe.errors import UserError


@pytest.fixture(scope="module")
def model(workplace) -> Path:
    """A folder with the tokenizer, like the folder of an exported model."""
    folder = workplace / "tokenizer"
    folder.mkdir()
    export_tokenizer("SentencePieceTokenizer", workplace / "tokenizer.model", folder)
    return folder


def test_batches_are_windows_in_order():
    batches = list(windows_of(np.arange(23), 5, 3))
    assert [batch.shape for batch in batches] == [(3, 5), (1, 5), (1, 3)]
    assert np.concatenate([batch.ravel() for batch in batches]).tolist() == list(range(23))


def megatron_splits(folder: Path, prefix: Path, split: str) -> list[np.ndarray | None]:
    """Return the sequences that Megatron's builder of datasets assigns to train, valid and test."""
    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=VOCAB_SIZE)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=4,
        blend=([str(prefix)], None),
        split=split,
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config)
    return [dataset and dataset.indices for dataset in builder.build()]


@given(
    st.lists(st.integers(1, 97), min_size=1, max_size=3).map(lambda shares: ",".join(map(str, shares))),
    st.sampled_from([7, 41, 150]),
)
def test_splits_are_megatrons(tmp_path, split, num_documents):
    prefix = tmp_path / f"data{num_documents}"
    if not Path(f"{prefix}.idx").exists():
        write_documents(prefix, ([number] * 30 for number in range(num_documents)))
    for name, sequences in zip(SPLITS, megatron_splits(tmp_path, prefix, split), strict=True):
        text = DatasetText(str(prefix), split, name)
        if sequences is None:
            with pytest.raises(UserError, match="leaves nothing"):
                split_sequences(split, name, num_documents)
        elif len(sequences):
            tokens = text.read(10**6, 8, VOCAB_SIZE)
            assert np.array_equal(tokens, np.repeat(sequences, 30))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 40))
def test_windows_are_whole_ordered_disjoint_and_reach_the_end(num_all, num_tokens, seq_length):
    tokens = spread_windows(np.arange(num_all), num_tokens, seq_length)
    assert len(tokens) == min(num_tokens, num_all)
    windows = [tokens[start : start + seq_length] for start in range(0, len(tokens), seq_length)]
    if num_all > num_tokens:
        assert all((np.diff(window) == 1).all() for window in windows)
        starts = [window[0] for window in windows]
        assert (np.diff(tokens) >= 1).all()
        assert starts[0] == 0
        if len(windows) > 1:
            assert starts[-1] == max(num_all - seq_length, (len(windows) - 1) * seq_length)
    else:
        assert tokens.tolist() == list(range(num_all))


def test_pieces(workplace, model, tmp_path):
    tokenizer = SentencePieceTokenizer(workplace / "tokenizer.model")
    ids = np.array([400, 3, 400, 299])
    assert read_pieces(model, ids) == {number: tokenizer.processor.id_to_piece(number) for number in (3, 299, 400)}
    assert read_pieces(tmp_path, ids) == {}


def test_what_does_not_fit(workplace, tmp_path):
    prefix = str(workplace / "data")
    for vocab_size, digest in ((60, None), (VOCAB_SIZE, "0" * 64)):
        with pytest.raises(UserError, match="another tokenizer"):
            DatasetText(prefix).read(10, 8, vocab_size, digest)
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"unrecorded.{suffix}")
    with pytest.raises(UserError, match=r"holds token id .* made with another tokenizer"):
        DatasetText(str(tmp_path / "unrecorded")).read(1000, 8, 60)
