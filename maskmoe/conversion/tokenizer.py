"""Finds the tokenizer that a model was trained with, and exports it in transformers' format."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

from maskmoe.conversion.settings import Settings
from maskmoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from maskmoe.data.tokenizer_record import model_file, tokenizer_sha256
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Names of the files of a tokenizer in transformers' format; only the first file is always there."""
WITHOUT_TEXT = "NullTokenizer"
"""Megatron's `--tokenizer-type` for data that consist of token ids; such data have no tokenizer to export."""

_ORIGIN = "made_from_sha256"
"""Key of an exported `tokenizer_config.json`: the digest of the file that the tokenizer was made from."""
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


def choose_tokenizer(args: Namespace | None, settings: Settings, may_replace: bool = False) -> tuple[str, str | None]:
    """Return type and path of a model's tokenizer: the user's, or the tokenizer of training, or its export.

    Args:
        args: Megatron's arguments that the model was trained with; None if they are unknown.
        settings: The settings of the conversion.
        may_replace: Whether the user's tokenizer may be another one than the tokenizer of training.

    Raises:
        UserError: The tokenizer of training is not on this machine, or the user's tokenizer is another one.
    """
    trained = vars(args or Namespace())
    kind, path = settings.tokenizer_type or trained.get("tokenizer_type"), settings.tokenizer_model
    if settings.tokenizer_type is None and path is None:
        return _find_tokenizer(trained, settings.load)
    if settings.tokenizer_type == WITHOUT_TEXT:
        return WITHOUT_TEXT, None
    if path is None or kind is None or kind == WITHOUT_TEXT:
        raise UserError("name the tokenizer by both flags, --tokenizer-type and --tokenizer-model")
    if not may_replace and not _has_digest(kind, path, trained.get("tokenizer_sha256")):
        raise UserError(f"--tokenizer-model {path} is not the tokenizer that {settings.load} was trained with")
    return kind, path


def _find_tokenizer(trained: Mapping[str, Any], folder: Path) -> tuple[str, str | None]:
    """Return type and path of the tokenizer of training or, if that is not at its path, of its export beside a model.

    If nothing is known of the training, a tokenizer beside the model is the model's.

    Args:
        trained: Megatron's arguments that the model was trained with; empty if they are unknown.
        folder: The folder of the model or checkpoint.

    Raises:
        UserError: There is no such tokenizer.
    """
    kind, path, sha256 = (trained.get(f"tokenizer_{name}") for name in ("type", "model", "sha256"))
    if kind == WITHOUT_TEXT:
        return WITHOUT_TEXT, None
    if kind is not None and path is not None and Path(path).exists() and _has_digest(kind, path, sha256):
        return kind, path
    exported = (HuggingFaceTokenizer.__name__, str(folder))
    if (folder / TOKENIZER_FILES[0]).is_file() and (kind is None or (sha256 and _has_digest(*exported, sha256))):
        return exported
    place = "is unknown" if path is None else f"is not at its path {path}"
    raise UserError(
        f"the tokenizer that {folder} was trained with {place}; name it by --tokenizer-type and --tokenizer-model, or "
        f"pass --tokenizer-type {WITHOUT_TEXT} to go without"
    )


def _has_digest(kind: str, path: str, sha256: str | None) -> bool:
    """Return whether a tokenizer has a digest, or was exported from the tokenizer with it; an unknown digest fits."""
    own = tokenizer_sha256(kind, path)
    if own is None or sha256 in (None, own):
        return True
    settings = model_file(kind, path).with_name(TOKENIZER_FILES[1])
    return settings.is_file() and read_json(settings).get(_ORIGIN) == sha256


def export_tokenizer(tokenizer_type: str, tokenizer_model: str | Path | None, folder: Path) -> dict[str, int | None]:
    """Write a tokenizer so that `AutoTokenizer.from_pretrained(folder)` reads it.

    The exported tokenizer records the digest of its original, see `choose_tokenizer`.

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
    exported.init_kwargs[_ORIGIN] = tokenizer.record().sha256
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
