"""Reads the probe text, which all models of a series route."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
import tokenizers
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from maskmoe.data.corpus import check_inputs, read_documents
from maskmoe.data.indexed_dataset import open_tokens, read_index, read_tokenizer_record
from maskmoe.data.tokenizer import HuggingFaceTokenizer
from maskmoe.errors import UserError
from maskmoe.routing_analysis.settings import SPLITS

_TOKENIZER_FILE = "tokenizer.json"
_DOCUMENTS_AT_A_TIME = 16


@dataclass(frozen=True, eq=False)
class Probe:
    """The token ids of a probe text, and how they are cut into windows.

    Attributes:
        token_ids: int64 [tokens].
        seq_length: number of tokens in a window; the last window may have fewer.
        batch_size: number of windows in a batch.
        source: the origin of the text, for people.
        pieces: the vocabulary's piece of every id that occurs; empty without a tokenizer.
    """

    token_ids: np.ndarray
    seq_length: int
    batch_size: int
    source: str
    pieces: Mapping[int, str]

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the windows in order, int64 [batch, sequence]; a shorter last window is a batch of its own."""
        num_whole = len(self.token_ids) // self.seq_length
        windows = self.token_ids[: num_whole * self.seq_length].reshape(num_whole, self.seq_length)
        for start in range(0, num_whole, self.batch_size):
            yield windows[start : start + self.batch_size]
        remaining = self.token_ids[num_whole * self.seq_length :]
        if len(remaining):
            yield remaining[None]


class ProbeText(ABC):
    """A source of a probe text."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Return the origin of the text, for people."""

    @abstractmethod
    def check(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        """Check everything that can be checked without a tokenizer.

        Args:
            vocab_size: number of token ids of the model.
            tokenizer_sha256: digest of the tokenizer file of the model; None if it is unknown.

        Raises:
            UserError: the source has no text, or the text does not fit the model.
        """

    @abstractmethod
    def read(self, num_tokens: int, seq_length: int, vocab_size: int, model: Path) -> np.ndarray:
        """Return the token ids of the text, int64 [at most num_tokens].

        Args:
            num_tokens: number of tokens to read.
            seq_length: number of tokens in a window.
            vocab_size: number of token ids of the model.
            model: the folder with the tokenizer of the model.

        Raises:
            UserError: the text cannot be read, or does not fit the model.
        """


@dataclass(frozen=True)
class DatasetText(ProbeText):
    """Windows that are spread evenly over an indexed dataset, or over one split of a dataset.

    Attributes:
        prefix: the path of the dataset without `.bin` and `.idx`.
        split: the value of Megatron's `--split`; None for the whole dataset.
        eval_split: the name of the split, one of `SPLITS`.
    """

    prefix: str
    split: str | None = None
    eval_split: str = "valid"

    @property
    def source(self) -> str:
        """Return the origin of the text, for people."""
        return self.prefix if self.split is None else f"{self.prefix} ({self.eval_split} of --split {self.split})"

    def check(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        """Check that the dataset has tokens and was made with the tokenizer of the model, see `ProbeText.check`."""
        record = read_tokenizer_record(self.prefix)
        if record is not None and (record.vocab_size > vocab_size or tokenizer_sha256 not in (None, record.sha256)):
            raise UserError(
                f"dataset {self.prefix} was made with another tokenizer ({record.model}, {record.vocab_size:,} ids) "
                f"than that of the model of {vocab_size:,} ids"
            )
        if not len(self._tokens()):
            raise UserError(f"{self.source} holds no tokens; choose another --eval-split or --split")

    def read(self, num_tokens: int, seq_length: int, vocab_size: int, model: Path) -> np.ndarray:
        """Return tokens from all over the dataset, see `ProbeText.read`."""
        token_ids = spread_windows(self._tokens(), num_tokens, seq_length).astype(np.int64)
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
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return tokens[ends[sequences.start] : ends[sequences.stop]]


def spread_windows(tokens: np.ndarray, num_tokens: int, seq_length: int) -> np.ndarray:
    """Return windows that are spread evenly over a text, so that no single document dominates.

    Args:
        tokens: all tokens of the text, [tokens].
        num_tokens: number of tokens to take.
        seq_length: number of tokens in a window; the last window may be shorter.

    Returns:
        The tokens of the windows, [min(num_tokens, tokens)].
    """
    if len(tokens) <= num_tokens:
        return tokens
    num_windows = -(-num_tokens // seq_length)
    last_start = max(0, len(tokens) - seq_length)
    starts = np.linspace(0, last_start, num_windows).round().astype(np.int64)
    return np.concatenate([tokens[start : start + seq_length] for start in starts])[:num_tokens]


def split_sequences(split: str, eval_split: str, num_sequences: int) -> range:
    """Return the sequences of a dataset that Megatron's `--split` assigns to a split.

    Args:
        split: the value of `--split`, such as "95,5,0".
        eval_split: the name of the split, one of `SPLITS`.
        num_sequences: number of sequences in the dataset.

    Raises:
        UserError: `split` is not valid, or assigns no sequences to the split.
    """
    try:
        with np.errstate(invalid="ignore"):
            shares = parse_and_normalize_split(split)
        bounds = convert_split_vector_to_split_matrix(shares)[SPLITS.index(eval_split)]
    except (AssertionError, ValueError) as error:
        raise UserError(f"--split {split} must be up to three numbers, such as 95,5,0") from error
    if not np.isfinite(shares).all():
        raise UserError(f"--split {split} has no number above 0")
    if bounds is None:
        raise UserError(f"--split {split} leaves nothing for --eval-split {eval_split}")
    # Round like `BlendedMegatronDatasetBuilder`.
    return range(*(round(bound * float(num_sequences)) for bound in bounds))


@dataclass(frozen=True)
class FileText(ProbeText):
    """The first tokens of text files, by the tokenizer of the model; an end-of-document id follows each document.

    Attributes:
        paths: files with JSON lines or plain text.
        json_key: the key of the text in JSON lines.
    """

    paths: Sequence[Path]
    json_key: str = "text"

    @property
    def source(self) -> str:
        """Return the origin of the text, for people."""
        return ", ".join(map(str, self.paths))

    def check(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        """Check that the files can be read, see `ProbeText.check`."""
        check_inputs(self.paths)

    def read(self, num_tokens: int, seq_length: int, vocab_size: int, model: Path) -> np.ndarray:
        """Return the first tokens of the files, see `ProbeText.read`."""
        if not (model / _TOKENIZER_FILE).is_file():
            raise UserError("--input needs a tokenizer, but the model has none; pass token ids with --data-path")
        tokenizer = HuggingFaceTokenizer(model)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer of {model} has {tokenizer.vocab_size:,} ids, but the model only {vocab_size:,}"
            )
        end = np.array([] if tokenizer.eod_id is None else [tokenizer.eod_id], np.int64)
        # Documents are encoded in small batches until there are enough tokens.
        parts, missing = [], num_tokens
        for documents in batched(read_documents(self.paths, self.json_key), _DOCUMENTS_AT_A_TIME):
            for ids in tokenizer.encode_batch(list(documents)):
                parts += [ids.astype(np.int64), end]
                missing -= len(ids) + len(end)
            if missing <= 0:
                break
        token_ids = np.concatenate(parts)[:num_tokens] if parts else np.array([], np.int64)
        if not len(token_ids):
            raise UserError(f"{self.source} has no text")
        return token_ids


def read_pieces(model: Path, token_ids: np.ndarray) -> dict[int, str]:
    """Return the vocabulary's piece of every id that occurs.

    Args:
        model: the folder with the tokenizer of the model; without a tokenizer the result is empty.
        token_ids: int64 [tokens].
    """
    path = model / _TOKENIZER_FILE
    if not path.is_file():
        return {}
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    pieces = {int(number): tokenizer.id_to_token(int(number)) for number in np.unique(token_ids)}
    return {number: piece for number, piece in pieces.items() if piece is not None}
