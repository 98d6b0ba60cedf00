"""Tokenizers for making datasets; in general, their ids equal those of Megatron-Core's tokenizers of the same names.

Megatron's own classes import torch, which takes seconds, and turn every id into a Python object.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.data.tokenizer_record import TOKENIZER_TYPES, TokenizerRecord, model_file, read_model
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json
from maskmoe.files.parsing import printable_name, reading

_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")  # keys of settings


class Tokenizer(ABC):
    """Encodes text to token ids.

    Attributes:
        model_path: The file that defines the tokenizer.
        vocab_size: Number of ids.
        eod_id: The id that ends a document, or None if the tokenizer has no such id.

    Raises:
        UserError: The file does not exist, does not define a tokenizer, or lacks its own end-of-sequence token.
    """

    vocab_size: int
    eod_id: int | None

    def __init__(self, model: str | Path) -> None:
        self.model_path = model_file(type(self).__name__, model)
        self._content = read_model(type(self).__name__, model)

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32 [tokens of the text]; the calling thread does all the work."""

    def record(self) -> TokenizerRecord:
        """Return the record that identifies this tokenizer, with the digest of its model file."""
        sha256 = hashlib.sha256(self._content).hexdigest()
        name = printable_name(self.model_path)
        return TokenizerRecord(type(self).__name__, name, sha256, self.vocab_size, self.eod_id)


class SentencePieceTokenizer(Tokenizer):
    """Encodes with a SentencePiece model, as Megatron-Core's class of this name; the end-of-sentence id is `eod_id`."""

    def __init__(self, model: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(model)
        self.processor = SentencePieceProcessor()
        with reading(f"{model} is not a SentencePiece model: it"):
            self.processor.LoadFromSerializedProto(self._content)
        self.vocab_size = self.processor.get_piece_size()
        eos_id = self.processor.eos_id()
        self.eod_id = eos_id if eos_id >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32 [tokens of the text]."""
        return self.processor.encode(texts, out_type="numpy", num_threads=1)


class HuggingFaceTokenizer(Tokenizer):
    """Encodes with a `tokenizer.json` or its folder, as Megatron-Core's class of this name does with default settings.

    The ids differ from Megatron-Core's if `tokenizer_config.json` names a class with which transformers 5 takes only
    the vocabulary from `tokenizer.json`, such as `GPT2Tokenizer`. The special tokens that the tokenizer itself adds to
    a text are kept. The end-of-sequence token of `tokenizer_config.json` ends a document. If `tokenizer_config.json`
    has no `added_tokens_decoder`, the settings of `special_tokens_map.json` take precedence, as in transformers 5.
    """

    def __init__(self, model: str | Path) -> None:
        # Processes, not threads, share the work. The library reads this variable when it encodes for the first time.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        super().__init__(model)
        with reading(f"{self.model_path} is not a tokenizer.json: it"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode("")  # fails here, not in a worker process, if a special token is missing
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        files = [self.model_path.parent / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
        config, special_map = (read_json(path) if os.path.isfile(path) else {} for path in files)
        settings = config if "added_tokens_decoder" in config else {**config, **special_map}
        self.eod_id = self._find_eod_id(settings)
        if config.get("split_special_tokens"):
            raise UserError(f"{files[0]} sets split_special_tokens, which is not supported: remove it")
        self._add_special_tokens(settings)
        # transformers adds the lists of both files.
        self._add_special_tokens({role: config[role] for role in _TOKEN_LISTS if role in config})

    def _find_eod_id(self, settings: Mapping[str, Any]) -> int | None:
        """Return the id of the end-of-sequence token that the settings name, or None."""
        ends = ((settings[role], role) for role in ("eos_token", "sep_token") if settings.get(role))
        return next((self._id_of(token, role) for token, role in ends), None)

    def _add_special_tokens(self, settings: Mapping[str, Any]) -> None:
        """Find the special tokens of the settings in texts, as transformers does; the tokenizer must know their ids."""
        known = self._tokenizer.get_added_tokens_decoder()
        for role, value in settings.items():
            if role in _TOKEN_LISTS:
                tokens = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            else:
                tokens = [value] if role.endswith("_token") and isinstance(value, str | dict) else []
            for token in filter(None, tokens):
                if self._id_of(token, role) not in known:
                    self._tokenizer.add_special_tokens([token["content"] if isinstance(token, dict) else token])

    def _id_of(self, token: Any, role: str) -> int:
        """Return the id of a special token of the settings; raise `UserError` if the tokenizer lacks the token."""
        content = token.get("content") if isinstance(token, dict) else token
        token_id = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        if token_id is None:
            raise UserError(
                f"tokenizer_config.json or special_tokens_map.json names {content!r} as {role}, which "
                f"{self.model_path} lacks, so transformers would add an id or fail: correct the name, or save the "
                "folder again by transformers' save_pretrained"
            )
        return token_id

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32 [tokens of the text]."""
        return [np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch_fast(texts)]


_CLASSES = {cls.__name__: cls for cls in (SentencePieceTokenizer, HuggingFaceTokenizer)}
# Megatron-Core builds its SentencePieceTokenizer for the other types also.
_CLASSES |= {name: SentencePieceTokenizer for name in TOKENIZER_TYPES if name not in _CLASSES}


def load_tokenizer(tokenizer_type: str, model: str | Path) -> Tokenizer:
    """Load the tokenizer that Megatron's `--tokenizer-type` and `--tokenizer-model` name. Raises UserError."""
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(f"unknown tokenizer type {tokenizer_type}; choose one of {', '.join(TOKENIZER_TYPES)}")
    return _CLASSES[tokenizer_type](model)
