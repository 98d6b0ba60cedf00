"""The tokenizer of a checkpoint in the format of transformers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from maskmoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from maskmoe.errors import UserError

WITHOUT_TEXT = "NullTokenizer"
"""Megatron's `--tokenizer-type` of data that are ids already: there is no tokenizer to export."""

_PIECES_OF_A_PROBE = 64
# What tokenizers treat differently: spaces, lines, other scripts, combined and unassigned characters, control pieces.
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


@dataclass(frozen=True)
class SpecialIds:
    """Ids with which texts begin and end; None where there is none."""

    bos: int | None
    eos: int | None


def export_tokenizer(tokenizer_type: str, tokenizer_model: str | Path, folder: Path) -> SpecialIds:
    """Write a tokenizer as `AutoTokenizer.from_pretrained(folder)` reads it.

    It gives the ids that the training data have: no id is put before a text. A text begins where the one before has
    ended, so its beginning is marked by the id that ends a document, if by any. What a text spells like a special piece
    (`</s>`) becomes that piece, as everywhere in transformers.

    Args:
        tokenizer_type: Megatron's `--tokenizer-type`: `SentencePieceTokenizer` or `HuggingFaceTokenizer`. Nothing is
            written for `NullTokenizer`.
        tokenizer_model: Megatron's `--tokenizer-model`.
        folder: gets `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        UserError: the tokenizer is of another type, cannot be read, or cannot be expressed: a trial gives other ids.
    """
    if tokenizer_type == WITHOUT_TEXT:
        return SpecialIds(None, None)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        exported = _load_transformers_tokenizer(tokenizer.model_path)
        probes = list(_PROBES)
    else:
        exported = _convert_sentencepiece(tokenizer)
        probes = [*_PROBES, *_probes_of_all_pieces(tokenizer)]
    _check_same_ids(tokenizer, exported, probes)
    exported.save_pretrained(folder)
    return SpecialIds(exported.bos_token_id, exported.eos_token_id)


def _load_transformers_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (model.parent / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(model.parent, local_files_only=True)
    return PreTrainedTokenizerFast(tokenizer_file=str(model))


def _convert_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

    extractor = SentencePieceExtractor(str(tokenizer.model_path))
    is_bpe = extractor.proto.trainer_spec.model_type == 2
    pieces = [(piece.piece, piece.score) for piece in extractor.proto.pieces]
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)} if is_bpe else pieces
    converted = SpmConverter.build_tokenizer_from_spm_proto(extractor.proto, vocab)
    special = {"unk_token": _piece(tokenizer, tokenizer.processor.unk_id())}
    if tokenizer.eod_id is not None:
        special |= dict.fromkeys(("bos_token", "eos_token"), _piece(tokenizer, tokenizer.eod_id))
    return PreTrainedTokenizerFast(tokenizer_object=converted, clean_up_tokenization_spaces=False, **special)


def _piece(tokenizer: SentencePieceTokenizer, number: int) -> str:
    return tokenizer.processor.id_to_piece(number)


def _probes_of_all_pieces(tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    """Texts in which every piece of the vocabulary occurs, in a random order."""
    processor: SentencePieceProcessor = tokenizer.processor
    numbers = np.random.default_rng(0).permutation(tokenizer.vocab_size).tolist()
    spelled = [number for number in numbers if not (processor.is_control(number) or processor.is_unknown(number))]
    for begin in range(0, len(spelled), _PIECES_OF_A_PROBE):
        yield processor.decode(spelled[begin : begin + _PIECES_OF_A_PROBE])


def _check_same_ids(tokenizer: Any, exported: Any, probes: list[str]) -> None:
    if len(exported) != tokenizer.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.model_path} has {tokenizer.vocab_size} ids, in transformers it has {len(exported)}"
        )
    expected = tokenizer.encode_batch(probes)
    for probe, ids, theirs in zip(probes, expected, exported(probes)["input_ids"], strict=True):
        if ids.tolist() != theirs:
            raise UserError(
                f"tokenizer {tokenizer.model_path} cannot be expressed in transformers: {probe!r} would get the ids "
                f"{theirs}, not {ids.tolist()}"
            )
