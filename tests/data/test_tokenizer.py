"""Compares the tokenizers with Megatron-Core's tokenizers of the same names."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from maskmoe.data.tokenizer import TOKENIZER_TYPES, load_tokenizer
from maskmoe.errors import UserError

TOKENS = st.sampled_from(["<begin>", "<end>", None])
LISTS = st.dictionaries(
    st.sampled_from(["additional_special_tokens", "extra_special_tokens"]), st.sampled_from([["<end>"], ["<new>"]])
)


def megatron_tokenizer(tokenizer_type: str, model: Path):
    """Build a tokenizer as `megatron.training` does for `--tokenizer-type` and `--tokenizer-model` alone."""
    unset = (
        "special_tokens vocab_file merge_file chat_template metadata_path tokenizer_sentencepiece_legacy "
        "tokenizer_hf_no_use_fast tokenizer_hf_no_include_special_tokens trust_remote_code pad_vocab_size use_gigatoken"
    )
    arguments = SimpleNamespace(
        **dict.fromkeys(unset.split()),
        tokenizer_type=tokenizer_type,
        tokenizer_model=str(model),
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
    )
    return build_tokenizer(arguments)


@pytest.fixture(params=TOKENIZER_TYPES)
def tokenizer_model(request: pytest.FixtureRequest) -> tuple[str, Path]:
    fixture = "huggingface_folder" if request.param == "HuggingFaceTokenizer" else "sentencepiece_model"
    return request.param, request.getfixturevalue(fixture)


def test_agrees_with_megatron(tokenizer_model: tuple[str, Path], texts: list[str]) -> None:
    ours, theirs = load_tokenizer(*tokenizer_model), megatron_tokenizer(*tokenizer_model)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod_id == theirs.eod
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs.tokenize(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<end>", "additional_special_tokens": ["<turn>"]},
        {
            "eos_token": {"__type": "AddedToken", "content": "<end>"},
            "extra_special_tokens": {"turn": "<turn>"},
        },
        {"added_tokens_decoder": {"1": {"content": "<turn>", "special": False}, "0": {"content": "<end>"}}},
    ],
)
def test_special_tokens_that_only_the_settings_name(tmp_path: Path, settings: dict) -> None:
    """As in a tokenizer.json that was made from the files `vocab.json` and `merges.txt` of GPT-2."""
    special = ["<end>", "<turn>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the end of the beginning. "] * 50, vocab_size=300, special_tokens=special)
    trained.save_model(str(tmp_path))
    ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save(
        str(tmp_path / "tokenizer.json")
    )
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "<turn> the end <end> of the <turn>beginning"
    ids = load_tokenizer("HuggingFaceTokenizer", tmp_path).encode_batch([text])[0].tolist()
    assert ids == megatron_tokenizer("HuggingFaceTokenizer", tmp_path).tokenize(text)
    assert (ids.count(0), ids.count(1)) == (1, 2)


def test_huggingface_folder_or_file(huggingface_folder: Path) -> None:
    records = [
        load_tokenizer("HuggingFaceTokenizer", path).record()
        for path in (huggingface_folder, huggingface_folder / "tokenizer.json")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("tokenizer_type", "error"),
    [
        ("SentencePieceTokenizer", "text is not a SentencePiece model"),
        ("HuggingFaceTokenizer", r"text is damaged \(Invalid JSON"),
    ],
)
def test_bad_models(tokenizer_type: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tokenizer_type, tmp_path / "missing")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(UserError, match=error):
        load_tokenizer(tokenizer_type, tmp_path / "text")


def test_template_with_a_missing_special_token(huggingface_folder: Path, tmp_path: Path) -> None:
    settings = json.loads((huggingface_folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json: it cannot be read; .*: no entry found for key"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path)


@given(
    config=st.dictionaries(st.sampled_from(["eos_token", "bos_token", "pad_token"]), TOKENS) | LISTS,
    special_map=st.none()
    | st.dictionaries(st.sampled_from(["eos_token", "bos_token"]), TOKENS | st.just({"content": "<end>"}))
    | LISTS,
    decoder=st.none() | st.just({"1": {"content": "<end>", "special": True}}),
)
def test_the_end_of_a_document_is_that_of_transformers(
    huggingface_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    config: dict[str, object],
    special_map: dict[str, object] | None,
    decoder: dict[str, object] | None,
) -> None:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "tokenizer.json").write_bytes((huggingface_folder / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if decoder is not None:
        config["added_tokens_decoder"] = decoder
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    theirs = AutoTokenizer.from_pretrained(folder)
    try:
        ours = load_tokenizer("HuggingFaceTokenizer", folder)
    except UserError:  # also refuses tokens of lists that transformers ignores beside other lists
        assert "<new>" in str((config, special_map))
    else:
        assert (ours.eod_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tokenizer type NoTokenizer"):
        load_tokenizer("NoTokenizer", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            '{"eos_token": "<nowhere>"}',
            "names '<nowhere>' as eos_token, which .* lacks, so transformers would add an id",
        ),
        ('{"pad_token": {"content": "<pad>"}}', "names '<pad>' as pad_token"),
        ('{"additional_special_tokens": ["<end>", "<x>"]}', "names '<x>' as additional_special_tokens"),
        ('{"extra_special_tokens": {"image_token": "<x>"}}', "names '<x>' as extra_special_tokens"),
        ('{"added_tokens_decoder": {"500": {"content": "<x>"}}}', "names '<x>' as added_tokens_decoder"),
        ('{"added_tokens_decoder": 5}', "names 5 as added_tokens_decoder"),
        ('{"eos_token": 5}', "names 5 as eos_token"),
        ('{"split_special_tokens": true}', "sets split_special_tokens, which is not supported"),
        ('{"eos_token": ["<x>"]}', r"names \['<x>'\] as eos_token"),
        ('{"eos_token": {"id": 2}}', "names None as eos_token"),
        ("{", "is damaged .Invalid JSON"),
        ("[]", "is damaged .should be an object"),
    ],
)
def test_bad_huggingface_settings(huggingface_folder: Path, tmp_path: Path, settings: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((huggingface_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match=message):
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
