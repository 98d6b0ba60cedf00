"""Reads the probe text, which all models of a series route."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from maskmoe.analysis.routing_statistics import SPLITS
from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.data.tokenizer_record import read_tokenizer_record
from maskmoe.errors import UserError

_TOKENIZER_FILE = "tokenizer.json"


def windows_of(token_ids: np.ndarray, seq_length: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yield the windows of a text in order, int64 [batch, sequence]; a shorter last window is a batch of its own."""
    num_whole = len(token_ids) // seq_length
    whole, remaining = np.split(token_ids, [num_whole * seq_length])
    windows = whole.reshape(num_whole, seq_length)
    for start in range(0, num_whole, batch_size):
        yield windows[start : start + batch_size]
    if len(remaining):
        yield remaining[None]


@dataclass(frozen=True)
class DatasetText:
    """Windows that are spread evenly over an indexed dataset, or over one split of a dataset.

    Attributes:
        prefix: The path of the dataset without `.bin` and `.idx`.
        split: The value of Megatron's `--split`; None for the whole dataset.
        eval_split: The name of the split, one of `SPLITS`.
    """

    prefix: str
    split: str | None = None
    eval_split: str = "valid"

    def read(
        self, num_tokens: int, seq_length: int, vocab_size: int, tokenizer_sha256: str | None = None
    ) -> np.ndarray:
        """Return tokens from all over the dataset, int64 [at most num_tokens].

        Args:
            num_tokens: Number of tokens to read.
            seq_length: Number of tokens in a window.
            vocab_size: Number of token ids of the model.
            tokenizer_sha256: Digest of the tokenizer file of the model; None if it is unknown.

        Raises:
            UserError: The text cannot be read, has no tokens, or does not fit the model.
        """
        record = read_tokenizer_record(self.prefix)
        if record is not None and (record.vocab_size > vocab_size or tokenizer_sha256 not in (None, record.sha256)):
            raise UserError(
                f"dataset {self.prefix} was made with another tokenizer ({record.model}, {record.vocab_size:,} ids) "
                f"than the model, which has {vocab_size:,} ids"
            )
        token_ids = spread_windows(self._tokens(), num_tokens, seq_length).astype(np.int64)
        if not len(token_ids):
            raise UserError(f"dataset {self.prefix} holds no tokens; choose another --eval-split or --split")
        is_foreign = (token_ids < 0) | (token_ids >= vocab_size)
        if is_foreign.any():
            raise UserError(
                f"dataset {self.prefix} holds token id {token_ids[is_foreign.argmax()]}, but the model has "
                f"{vocab_size:,} ids; it was made with another tokenizer"
            )
        return token_ids

    def _tokens(self) -> np.ndarray:
        """Return all tokens of the split, in the dtype of the dataset."""
        tokens = open_tokens(self.prefix)
        if self.split is None:
            return tokens
        lengths = read_index(self.prefix).sequence_lengths
        sequences = split_sequences(self.split, self.eval_split, len(lengths))
        start = lengths[: sequences.start].sum(dtype=np.int64)
        return tokens[start : start + lengths[sequences.start : sequences.stop].sum(dtype=np.int64)]


def spread_windows(tokens: np.ndarray, num_tokens: int, seq_length: int) -> np.ndarray:
    """Return disjoint windows that are spread evenly over a text, so that no single document dominates.

    Args:
        tokens: All tokens of the text, [tokens].
        num_tokens: Number of tokens to take.
        seq_length: Number of tokens in a window; the last window may be shorter.

    Returns:
        The tokens of the windows, [min(num_tokens, tokens)].
    """
    if len(tokens) <= num_tokens:
        return tokens
    num_windows = -(-num_tokens // seq_length)
    # If the windows hardly fit, they follow each other from the start without gaps.
    last_start = max((num_windows - 1) * seq_length, len(tokens) - seq_length)
    starts = np.linspace(0, last_start, num_windows).round().astype(np.int64)
    return np.concatenate([tokens[start : start + seq_length] for start in starts])[:num_tokens]


def split_sequences(split: str, eval_split: str, num_sequences: int) -> range:
    """Return the sequences of a dataset that Megatron's `--split` assigns to a split.

    Args:
        split: A valid value of `--split`, such as "95,5,0".
        eval_split: The name of the split, one of `SPLITS`.
        num_sequences: Number of sequences in the dataset.

    Raises:
        UserError: `split` assigns no sequences to the split.
    """
    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[SPLITS.index(eval_split)]
    if bounds is None:
        raise UserError(f"--split {split} leaves nothing for --eval-split {eval_split}")
    # Round like `BlendedMegatronDatasetBuilder`.
    return range(*(round(bound * float(num_sequences)) for bound in bounds))


def read_pieces(model: Path, token_ids: np.ndarray) -> dict[int, str]:
    """Return the vocabulary's piece of every id that occurs.

    Args:
        model: The folder with the tokenizer of the model; without a tokenizer the result is empty.
        token_ids: int64 [tokens].
    """
    path = model / _TOKENIZER_FILE
    if not path.is_file():
        return {}
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    pieces = {number: tokenizer.id_to_token(number) for number in np.unique(token_ids).tolist()}
    return {number: piece for number, piece in pieces.items() if piece is not None}
