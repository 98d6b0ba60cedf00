"""The tokenizers of datasets, with the ids that Megatron-Core's tokenizers of the same names give.

Each wraps its library directly: Megatron's own classes import torch (seconds), and turn every id into a Python object.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.errors import UserError


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made a dataset.

    Attributes:
        type: Megatron's `--tokenizer-type`.
        model: file name of the model, without folders.
        sha256: hex digest of the model file's content.
        vocab_size: number of ids.
        eod_id: the id that ends a document; None where the tokenizer has none.
    """

    type: str
    model: str
    sha256: str
    vocab_size: int
    eod_id: int | None

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TokenizerRecord":
        """The record that `to_json` described. Raises TypeError where keys are missing, unknown or of another type."""
        record = cls(**values)
        texts = (record.type, record.model, record.sha256)
        numbers = (record.vocab_size, 0 if record.eod_id is None else record.eod_id)
        if any(type(text) is not str for text in texts) or any(type(number) is not int for number in numbers):
            raise TypeError("a value has another type than a tokenizer record's")
        return record


class Tokenizer(ABC):
    """Text to token ids.

    Attributes:
        model_path: the file that defines the tokenizer.
        vocab_size: number of ids.
        eod_id: the id that ends a document; None where the tokenizer has none.
    """

    model_path: Path
    vocab_size: int
    eod_id: int | None

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens of the text], on the calling thread alone."""

    def record(self) -> TokenizerRecord:
        """What identifies this tokenizer."""
        return TokenizerRecord(
            type=type(self).__name__,
            model=self.model_path.name,
            sha256=hashlib.sha256(self.model_path.read_bytes()).hexdigest(),
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; Megatron-Core's `SentencePieceTokenizer` in its default settings.

    The end-of-sentence id serves as the end of a document.

    Args:
        model: path of the `.model` file.

    Raises:
        UserError: the file does not exist or is not a SentencePiece model.
    """

    def __init__(self, model: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model_path = _existing_file(Path(model), "SentencePiece model")
        self.processor = SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(self.model_path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"tokenizer {model} is not a SentencePiece model") from error
        self.vocab_size = self.processor.get_piece_size()
        eos_id = self.processor.eos_id()
        self.eod_id = eos_id if eos_id >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return self.processor.encode(texts, out_type="numpy", num_threads=1)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library; Megatron-Core's `HuggingFaceTokenizer` in its default settings.

    As there, texts get the special tokens that the tokenizer itself adds, and the end-of-sequence token of
    `tokenizer_config.json` (else `special_tokens_map.json`) serves as the end of a document.

    Args:
        model: a `tokenizer.json`, or the folder that holds it.

    Raises:
        UserError: the file does not exist, is not a tokenizer, or does not know its own end-of-sequence token.
    """

    def __init__(self, model: str | Path) -> None:
        # Processes, not threads, share the work; the library reads this when it first encodes.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        path = Path(model)
        self.model_path = _existing_file(path / "tokenizer.json" if path.is_dir() else path, "Hugging Face tokenizer")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.model_path))
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"tokenizer {self.model_path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eod_id = self._find_eod_id()

    def _find_eod_id(self) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.model_path.parent / name
            settings = _read_json_object(path) if path.is_file() else {}
            token = settings.get("eos_token") or settings.get("sep_token")
            if token:
                content = token["content"] if isinstance(token, dict) else token
                eod_id = self._tokenizer.token_to_id(content)
                if eod_id is None:
                    raise UserError(
                        f"{path} names {content!r} as the end of text, but {self.model_path} does not know it"
                    )
                return eod_id
        return None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch_fast(texts)]


TOKENIZER_TYPES: dict[str, type[Tokenizer]] = {
    cls.__name__: cls for cls in (SentencePieceTokenizer, HuggingFaceTokenizer)
}


def load_tokenizer(tokenizer_type: str, model: str | Path) -> Tokenizer:
    """The tokenizer that Megatron's `--tokenizer-type` and `--tokenizer-model` name.

    Raises:
        UserError: the type is unknown, or the model cannot be read.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(f"unknown tokenizer type {tokenizer_type}; known are {', '.join(TOKENIZER_TYPES)}")
    return TOKENIZER_TYPES[tokenizer_type](model)


def _existing_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist")
    return path


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values
