"""Finds the tokenizer that a model was trained with, and exports it in transformers' format."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

from maskmoe.conversion.settings import Settings
from maskmoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from maskmoe.data.tokenizer_record import TOKENIZER_TYPES, tokenizer_sha256
from maskmoe.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Names of the files of a tokenizer in transformers' format; only the first file is always there."""
WITHOUT_TEXT = "NullTokenizer"
"""Megatron's `--tokenizer-type` for data that consist of token ids; such data have no tokenizer to export."""

_PIECES_PER_PROBE = 64
# Text that tokenizers treat differently: spaces, lines, other scripts, combined and unassigned characters, control
# pieces.
_PROBES = (
    "",
    " ",
    "a",
    "  two  spaces  ",
    "\n\n\tif x:\n        return 1e-5\r\n",
    "▁ 1234567890 ▁",
    "naïve cafe\u0301 ﬁn Ⅷ",
    "日本語とالعربية и עברית 👩‍👩‍👧 \U000e0041\x00\x07\xad\ufeff\u3000",
)


def choose_tokenizer(
    args: Namespace | None, settings: Settings, vocab_size: int | None = None, may_replace: bool = False
) -> tuple[str, str | None]:
    """Return type and path of the tokenizer: the user's, else Megatron's, else the tokenizer beside the model.

    Megatron's arguments name the path of a file, which may have been replaced since, and hold the file's digest.

    Args:
        args: Megatron's arguments that the model was trained with; None if they are unknown.
        settings: The settings of the conversion.
        vocab_size: The number of ids of the model, which may have been resized for a tokenizer with further ids, which
            then lies beside the model; None for a model that was not.
        may_replace: Whether the user's tokenizer may be another one than the tokenizer of training.

    Raises:
        UserError: The tokenizer is not on this machine, its type is unknown, or the model was trained with another one.
    """
    kind = settings.tokenizer_type or getattr(args, "tokenizer_type", None)
    path = settings.tokenizer_model or getattr(args, "tokenizer_model", None)
    if kind is None and settings.tokenizer_model is not None:
        raise UserError(f"--tokenizer-model {path} needs --tokenizer-type")
    if kind == WITHOUT_TEXT:
        return kind, None
    beside = _tokenizer_beside(settings)
    if kind is None:
        return beside or (WITHOUT_TEXT, None)
    if path is None:
        if beside is None:
            raise UserError(f"--tokenizer-type {kind} needs --tokenizer-model")
        return beside
    is_replaced = may_replace and settings.tokenizer_model is not None
    fault = _fault_of(kind, path, None if is_replaced else getattr(args, "tokenizer_sha256", None))
    if not fault:
        return beside if beside and _was_extended((kind, path), beside, vocab_size) else (kind, path)
    if beside is None:
        raise UserError(
            f"the tokenizer {path} of {settings.load} {fault}; pass --tokenizer-model with the right file, or "
            f"--tokenizer-type {WITHOUT_TEXT} to go without"
        )
    return beside


def _tokenizer_beside(settings: Settings) -> tuple[str, str] | None:
    """Return type and path of the tokenizer in the folder of the model, unless the user names another one."""
    kind = HuggingFaceTokenizer.__name__
    may_take = settings.tokenizer_model is None and settings.tokenizer_type in (None, kind)
    return (kind, str(settings.load)) if may_take and (settings.load / TOKENIZER_FILES[0]).is_file() else None


def _fault_of(kind: str, path: str, trained_with: str | None) -> str:
    """Return what is wrong with a tokenizer if the model was trained with one of another digest, which may be None."""
    if not Path(path).exists():
        return "does not exist"
    sha256 = tokenizer_sha256(kind, path)
    if sha256 is None or trained_with is None or sha256 == trained_with:
        return ""
    return f"(sha256 {sha256[:12]}…) is not the file that the model was trained with (sha256 {trained_with[:12]}…)"


def _was_extended(trained_with: tuple[str, str], beside: tuple[str, str], vocab_size: int | None) -> bool:
    """Return whether a model was resized for the further ids of the tokenizer beside it, after its training."""
    if vocab_size is None or trained_with[0] not in TOKENIZER_TYPES:
        return False
    num_trained = load_tokenizer(*trained_with).vocab_size
    return num_trained < vocab_size and num_trained < load_tokenizer(*beside).vocab_size <= vocab_size


def export_tokenizer(tokenizer_type: str, tokenizer_model: str | Path | None, folder: Path) -> dict[str, int | None]:
    """Write a tokenizer so that `AutoTokenizer.from_pretrained(folder)` reads it.

    The exported tokenizer gives the ids that the training data have: it puts no id before a text. In training data, a
    text begins where the previous text has ended, so the id that ends a document also marks the beginning of a text.
    Text that spells a special piece (`</s>`) becomes that piece, as everywhere in transformers.

    Args:
        tokenizer_type: Megatron's `--tokenizer-type`: `SentencePieceTokenizer`, `HuggingFaceTokenizer`, or
            `NullTokenizer`, for which nothing is written.
        tokenizer_model: Megatron's `--tokenizer-model`; None only for `NullTokenizer`.
        folder: The folder for `tokenizer.json` and `tokenizer_config.json`.

    Returns:
        `bos_token_id` and `eos_token_id`, the ids with which texts begin and end; None for a missing id.

    Raises:
        UserError: The tokenizer is of another type, cannot be read, or has no equal in transformers: sample texts get
            other ids.
    """
    if tokenizer_type == WITHOUT_TEXT:
        return {"bos_token_id": None, "eos_token_id": None}
    if tokenizer_model is None:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    probes = list(_PROBES)
    if isinstance(tokenizer, SentencePieceTokenizer):
        exported = _convert_sentencepiece(tokenizer)
        probes.extend(_probes_of_all_pieces(tokenizer))
    else:
        exported = _load_transformers_tokenizer(tokenizer.model_path)
        if exported.eos_token_id is None and tokenizer.eod_id is not None:
            # Training falls back to `sep_token`, and reads `special_tokens_map.json` without `tokenizer_config.json`.
            exported.eos_token = exported.convert_ids_to_tokens(tokenizer.eod_id)
    _check_same_ids(tokenizer, exported, probes)
    exported.save_pretrained(folder)
    return {"bos_token_id": exported.bos_token_id, "eos_token_id": exported.eos_token_id}


def _load_transformers_tokenizer(model: Path) -> Any:
    """Load a `tokenizer.json`, with the special tokens of `tokenizer_config.json` if that lies beside it.

    `AutoTokenizer` would make the class that `tokenizer_config.json` names. Some classes, such as `GPT2Tokenizer`, take
    only the vocabulary from the file, and cut text into words in their own way.
    """
    if (model.parent / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(model.parent, local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_file=str(model))


def _convert_sentencepiece(tokenizer: SentencePieceTokenizer) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece tokenizer into a tokenizer of transformers."""
    extractor = SentencePieceExtractor(str(tokenizer.model_path))
    is_bpe = extractor.proto.trainer_spec.model_type == 2
    pieces = [(piece.piece, piece.score) for piece in extractor.proto.pieces]
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)} if is_bpe else pieces
    converted = SpmConverter.build_tokenizer_from_spm_proto(extractor.proto, vocab)
    special = {"unk_token": tokenizer.processor.unk_id(), "bos_token": tokenizer.eod_id, "eos_token": tokenizer.eod_id}
    spelled = {name: tokenizer.processor.id_to_piece(id_) for name, id_ in special.items() if id_ is not None}
    return PreTrainedTokenizerFast(tokenizer_object=converted, clean_up_tokenization_spaces=False, **spelled)


def _probes_of_all_pieces(tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    """Yield texts that together contain every piece of the vocabulary, in a random order."""
    processor = tokenizer.processor
    numbers = np.random.default_rng(0).permutation(tokenizer.vocab_size).tolist()
    spelled = [number for number in numbers if not (processor.is_control(number) or processor.is_unknown(number))]
    for begin in range(0, len(spelled), _PIECES_PER_PROBE):
        yield processor.decode(spelled[begin : begin + _PIECES_PER_PROBE])


def _check_same_ids(tokenizer: Tokenizer, exported: Any, probes: list[str]) -> None:
    """Check that the exported tokenizer has as many ids as the original and gives the same ids for sample texts.

    Raises:
        UserError: The tokenizers differ.
    """
    if len(exported) != tokenizer.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.model_path} has {tokenizer.vocab_size} ids, in transformers it has {len(exported)}"
        )
    expected = tokenizer.encode_batch(probes)
    for probe, ids, exported_ids in zip(probes, expected, exported(probes)["input_ids"], strict=True):
        if ids.tolist() != exported_ids:
            raise UserError(
                f"tokenizer {tokenizer.model_path} cannot be expressed in transformers: {probe!r} would get the ids "
                f"{exported_ids}, not {ids.tolist()}"
            )
