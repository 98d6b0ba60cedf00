"""Choose the documents of a dataset that are held out from training."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.errors import UserError

_HELD_OUT_SHARE = 0.02
_MAX_HELD_OUT_TOKENS = 200_000


@dataclass(frozen=True)
class Split:
    """The last documents of a dataset are held out. Megatron's `--split` counts documents.

    Attributes:
        train_documents: number of documents to train on.
        held_out_documents: number of held-out documents.
    """

    train_documents: int
    held_out_documents: int

    @property
    def flag(self) -> str:
        """Value of Megatron's `--split`."""
        return f"{self.train_documents},{self.held_out_documents},0"


def choose_split(dataset_prefix: Path, seq_length: int) -> Split:
    """Hold out about 2 % of the tokens, at least one sample and at most what a short evaluation needs.

    Raises:
        UserError: the dataset has too few documents or tokens for both parts.
    """
    lengths = _document_lengths(dataset_prefix)
    if len(lengths) < 2:
        raise UserError(
            "the input is a single document, but training and evaluation need one document each: give several files, "
            "JSON lines with one document each, or a text file above 1 MB"
        )
    sample = seq_length + 1
    for wanted in (max(sample, min(int(_HELD_OUT_SHARE * lengths.sum()), _MAX_HELD_OUT_TOKENS)), sample):
        held_out = int(np.searchsorted(np.cumsum(lengths[::-1]), wanted)) + 1
        if held_out < len(lengths) and lengths[:-held_out].sum() >= sample:
            return Split(len(lengths) - held_out, held_out)
    raise UserError(
        f"the input's {lengths.sum()} tokens in {len(lengths)} documents are too few to train and to evaluate on "
        f"samples of --seq-length {seq_length}: give more or smaller documents, or a smaller --seq-length"
    )


def opening_of_held_out_text(dataset_prefix: Path, tokenizer_model: Path, split: Split, num_tokens: int) -> str:
    """Return the text of the first tokens of the first held-out document."""
    from sentencepiece import SentencePieceProcessor

    start = int(_document_lengths(dataset_prefix)[: split.train_documents].sum())
    ids = open_tokens(dataset_prefix)[start : start + num_tokens]
    text = SentencePieceProcessor(model_file=str(tokenizer_model)).decode(ids.tolist())
    # The last token may end inside a character.
    return text.rstrip("\ufffd")


def _document_lengths(dataset_prefix: Path) -> np.ndarray:
    """Return the number of tokens of each document, int64 [documents]."""
    index = read_index(dataset_prefix)
    ends = np.concatenate(([0], np.cumsum(index.sequence_lengths, dtype=np.int64)))
    return np.diff(ends[index.document_indices])
