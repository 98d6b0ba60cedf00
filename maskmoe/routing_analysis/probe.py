"""The text that all models of a series route: where it comes from, and its token ids."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np

from maskmoe.data.corpus import check_inputs, read_documents
from maskmoe.data.indexed_dataset import open_tokens, read_index, read_tokenizer_record
from maskmoe.data.tokenizer import HuggingFaceTokenizer
from maskmoe.errors import UserError

SPLITS = ("train", "valid", "test")
_TOKENIZER_FILE = "tokenizer.json"
_DOCUMENTS_AT_A_TIME = 16


@dataclass(frozen=True, eq=False)
class Probe:
    """Token ids, cut into windows of the model's sequence length.

    Attributes:
        token_ids: int64 [tokens].
        seq_length: tokens of a window; the last window may have fewer.
        batch_size: windows that a model gets at a time.
        source: where they come from, for people.
        pieces: the vocabulary's piece of every id that occurs; empty without a tokenizer.
    """

    token_ids: np.ndarray
    seq_length: int
    batch_size: int
    source: str
    pieces: Mapping[int, str]

    def batches(self) -> Iterator[np.ndarray]:
        """Windows in order, int64 [batch, sequence]; the shorter last window is a batch of its own."""
        num_whole = len(self.token_ids) // self.seq_length
        windows = self.token_ids[: num_whole * self.seq_length].reshape(num_whole, self.seq_length)
        for start in range(0, num_whole, self.batch_size):
            yield windows[start : start + self.batch_size]
        rest = self.token_ids[num_whole * self.seq_length :]
        if len(rest):
            yield rest[None]


class ProbeText(ABC):
    """A source of token ids."""

    source: str

    @abstractmethod
    def check(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        """Find out what can be found out without a tokenizer.

        Args:
            vocab_size: of the model.
            tokenizer_sha256: digest of the file of the model's tokenizer; None if it is not known.

        Raises:
            UserError: there is no text, or it does not fit the model.
        """

    @abstractmethod
    def read(self, num_tokens: int, seq_length: int, vocab_size: int, model: Path) -> np.ndarray:
        """Token ids, int64 [at most num_tokens].

        Args:
            num_tokens: how many.
            seq_length: of the windows that they will be cut into.
            vocab_size: of the model.
            model: its folder, which has the tokenizer.

        Raises:
            UserError: they cannot be read, or do not fit the model.
        """


@dataclass(frozen=True)
class DatasetText(ProbeText):
    """The tokens of an indexed dataset, or of one split of it; windows that are spread evenly over it.

    Attributes:
        prefix: path without `.bin` and `.idx`.
        split: Megatron's `--split`; None: the whole dataset.
        eval_split: which of `SPLITS`.
    """

    prefix: str
    split: str | None = None
    eval_split: str = "valid"

    @property
    def source(self) -> str:
        return self.prefix if self.split is None else f"{self.prefix} ({self.eval_split} of --split {self.split})"

    def check(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        record = read_tokenizer_record(self.prefix)
        if record is not None and (record.vocab_size > vocab_size or tokenizer_sha256 not in (None, record.sha256)):
            raise UserError(
                f"dataset {self.prefix} was made with another tokenizer ({record.model}, {record.vocab_size:,} ids) "
                f"than that of the model of {vocab_size:,} ids"
            )
        if not len(self._tokens()):
            raise UserError(f"{self.source} holds no tokens; choose another --eval-split or --split")

    def read(self, num_tokens: int, seq_length: int, vocab_size: int, model: Path) -> np.ndarray:
        token_ids = spread_windows(self._tokens(), num_tokens, seq_length).astype(np.int64)
        is_foreign = (token_ids < 0) | (token_ids >= vocab_size)
        if is_foreign.any():
            raise UserError(
                f"dataset {self.prefix} holds token id {token_ids[is_foreign.argmax()]}, but the model has "
                f"{vocab_size:,} ids; it was made with another tokenizer"
            )
        return token_ids

    def _tokens(self) -> np.ndarray:
        """All tokens of the split, in the dataset's dtype."""
        tokens = open_tokens(self.prefix)
        if self.split is None:
            return tokens
        lengths = read_index(self.prefix).sequence_lengths
        sequences = split_sequences(self.split, self.eval_split, len(lengths))
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return tokens[ends[sequences.start] : ends[sequences.stop]]


def spread_windows(tokens: np.ndarray, num_tokens: int, seq_length: int) -> np.ndarray:
    """Windows from all over a text, so that no single document decides: [min(num_tokens, len(tokens))].

    Args:
        tokens: [all tokens].
        num_tokens: how many to take.
        seq_length: of a window; the last one may be shorter.
    """
    if len(tokens) <= num_tokens:
        return tokens
    num_windows = -(-num_tokens // seq_length)
    last_start = max(0, len(tokens) - seq_length)
    starts = np.linspace(0, last_start, num_windows).round().astype(np.int64)
    return np.concatenate([tokens[start : start + seq_length] for start in starts])[:num_tokens]


def split_sequences(split: str, eval_split: str, num_sequences: int) -> range:
    """The sequences of a dataset that Megatron's `--split` gives to a split.

    Args:
        split: such as "95,5,0".
        eval_split: which of `SPLITS`.
        num_sequences: of the dataset.

    Raises:
        UserError: `split` makes no sense, or gives the split nothing.
    """
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

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
    # As BlendedMegatronDatasetBuilder rounds.
    return range(*(round(bound * float(num_sequences)) for bound in bounds))


@dataclass(frozen=True)
class FileText(ProbeText):
    """The beginning of text files, by the model's own tokenizer; its id that ends a document comes after each.

    Attributes:
        paths: JSON lines or plain text.
        json_key: of the text in JSON lines.
    """

    paths: Sequence[Path]
    json_key: str = "text"

    @property
    def source(self) -> str:
        return ", ".join(map(str, self.paths))

    def check(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        check_inputs(self.paths)

    def read(self, num_tokens: int, seq_length: int, vocab_size: int, model: Path) -> np.ndarray:
        if not (model / _TOKENIZER_FILE).is_file():
            raise UserError("--input needs a tokenizer, but the model has none; pass token ids with --data-path")
        tokenizer = HuggingFaceTokenizer(model)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer of {model} has {tokenizer.vocab_size:,} ids, but the model only {vocab_size:,}"
            )
        end = np.array([] if tokenizer.eod_id is None else [tokenizer.eod_id], np.int64)
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
    """The piece of every id that occurs, by the tokenizer in a model's folder; none if there is none."""
    path = model / _TOKENIZER_FILE
    if not path.is_file():
        return {}
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    pieces = {int(number): tokenizer.id_to_token(int(number)) for number in np.unique(token_ids)}
    return {number: piece for number, piece in pieces.items() if piece is not None}
