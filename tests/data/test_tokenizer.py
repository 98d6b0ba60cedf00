"""Compares the tokenizers with Megatron-Core's tokenizers of the same names."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from transformers import AutoTokenizer

from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_record import TOKENIZER_TYPES
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
