"""Which tokenizer made a dataset or trains a model: the digest of its file, and the record beside a dataset."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from maskmoe.errors import UserError
from maskmoe.files.untrusted import MAX_JSON_BYTES, UnusableFile, read_bounded, read_json_bytes, type_adapter

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""The values of Megatron's `--tokenizer-type` with which datasets can be made."""


@dataclass(frozen=True)
class TokenizerRecord:
    """Identifies the tokenizer that made a dataset.

    Attributes:
        type: Value of Megatron's `--tokenizer-type`.
        model: File name of the model, without folders, see `printable_name`.
        eod_id: The id that ends a document, or None if the tokenizer has no such id.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads this attribute of the class

    type: str
    model: str
    sha256: str
    vocab_size: int
    eod_id: int | None

    def is_same_as(self, other: "TokenizerRecord | None") -> bool:
        """Return whether two records differ in the name of the model's file at most."""
        return other is not None and replace(self, model=other.model) == other

    def __str__(self) -> str:
        return f"{self.type} {self.model} ({self.vocab_size} ids, sha256 {self.sha256[:12]})"


def model_file(tokenizer_type: str, model: str | Path) -> Path:
    """Return the file that defines a tokenizer: `--tokenizer-model` itself, or the `tokenizer.json` in its folder."""
    is_folder = tokenizer_type == "HuggingFaceTokenizer" and os.path.isdir(model)
    return Path(model) / "tokenizer.json" if is_folder else Path(model)


def read_model(tokenizer_type: str, model: str | Path) -> bytes:
    """Return the content of the file that defines a tokenizer. Raises UserError if it cannot be read."""
    try:
        return read_bounded(model_file(tokenizer_type, model), MAX_JSON_BYTES)
    except UnusableFile as error:
        raise UserError(f"model {error} ({tokenizer_type})") from error


def tokenizer_sha256(tokenizer_type: str, model: str | Path | None) -> str | None:
    """Return the digest of a tokenizer's file as training records it; None for types that have no record.

    Raises:
        UserError: The file cannot be read.
    """
    if tokenizer_type not in TOKENIZER_TYPES or model is None:
        return None
    return hashlib.sha256(read_model(tokenizer_type, model)).hexdigest()


def tokenizer_record_path(prefix: str | Path) -> Path:
    """Return the path of the file beside a dataset that records the dataset's tokenizer."""
    return Path(f"{prefix}.tokenizer.json")


def read_tokenizer_record(prefix: str | Path) -> TokenizerRecord | None:
    """Return the record of the dataset's tokenizer, None if there is none; raise `UserError` if it is not valid."""
    path = tokenizer_record_path(prefix)
    if not os.path.lexists(path):
        return None
    try:
        return type_adapter(TokenizerRecord).validate_json(read_json_bytes(path), strict=True)
    except ValueError as error:
        raise UserError(f"{path} is not a tokenizer record; delete it or make the dataset again") from error
