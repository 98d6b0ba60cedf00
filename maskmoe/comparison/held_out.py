"""Choose the documents of a dataset that are held out from training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskmoe.data.documents import read_documents
from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.errors import UserError

_HELD_OUT_SHARE = 0.02
_MAX_HELD_OUT_TOKENS = 200_000
# Tokens of a small vocabulary have more bytes than this, so no text is refused that is large enough.
_LEAST_BYTES_OF_TOKEN = 1.5
_SINGLE_DOCUMENT = (
    "the input is a single document, but training and evaluation need one document each: give several files, "
    "JSON lines with one document each, or a text file above 1 MB"
)


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


def check_text(paths: Sequence[Path], json_key: str, seq_length: int) -> None:
    """Refuse a text that `choose_split` would refuse as a dataset, as far as its bytes tell.

    The text is read only until it is large enough.

    Args:
        paths: the text files.
        json_key: key of a JSON line whose value is the document.
        seq_length: tokens in a sample.

    Raises:
        UserError: the text has one document, or too few bytes for two samples; or it cannot be read.
    """
    needed = _LEAST_BYTES_OF_TOKEN * 2 * (seq_length + 1)
    num_documents = num_bytes = 0
    for document in filter(None, read_documents(paths, json_key)):
        num_documents, num_bytes = num_documents + 1, num_bytes + len(document.encode())
        if num_documents > 1 and num_bytes >= needed:
            return
    if num_documents == 1:
        raise UserError(_SINGLE_DOCUMENT)
    raise UserError(
        f"the input's {num_bytes} bytes in {num_documents} documents are too few to train and to evaluate on samples "
        f"of --seq-length {seq_length}: give more documents, or a smaller --seq-length"
    )


def choose_split(dataset_prefix: Path, seq_length: int) -> Split:
    """Hold out about 2 % of the tokens, at least one sample and at most what a short evaluation needs.

    Raises:
        UserError: the dataset has too few documents or tokens for both parts.
    """
    boundaries = read_index(dataset_prefix).document_boundaries
    num_documents, num_tokens = len(boundaries) - 1, int(boundaries[-1])
    if num_documents < 2:
        raise UserError(_SINGLE_DOCUMENT)
    sample = seq_length + 1
    for wanted in (max(sample, min(int(_HELD_OUT_SHARE * num_tokens), _MAX_HELD_OUT_TOKENS)), sample):
        # Hold out as few documents as have the wanted number of tokens.
        train_documents = int(np.searchsorted(boundaries, num_tokens - wanted, side="right")) - 1
        if train_documents > 0 and boundaries[train_documents] >= sample:
            return Split(train_documents, num_documents - train_documents)
    raise UserError(
        f"the input's {num_tokens} tokens in {num_documents} documents are too few to train and to evaluate on "
        f"samples of --seq-length {seq_length}: give more or smaller documents, or a smaller --seq-length"
    )


def opening_of_held_out_text(dataset_prefix: Path, tokenizer_model: Path, split: Split, num_tokens: int) -> str:
    """Return the text of the first tokens of the first held-out document."""
    from sentencepiece import SentencePieceProcessor

    start = read_index(dataset_prefix).document_boundaries[split.train_documents]
    ids = open_tokens(dataset_prefix)[start : start + num_tokens]
    text = SentencePieceProcessor(model_file=str(tokenizer_model)).decode(ids.tolist())
    # The last token may end inside a character.
    return text.rstrip("\ufffd")
