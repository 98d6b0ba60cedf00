"""Exported tokenizers give the same ids as the library that made the training data."""

import io
import json

import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError

WORDS = "the quick brown fox jumps over a lazy dog , and 12 cafés déjà vu ; x = f ( y ) \n    return naïve 日本"
TEXTS = [" ".join(WORDS.split(" ")[start::step]) for start in range(12) for step in range(1, 9)]


def train_foreign(**settings) -> bytes:
    """Train a SentencePiece model with other settings than `train_tokenizer` uses."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, hard_vocab_limit=False, minloglevel=2, **settings
    )
    return model.getvalue()


MODELS = {
    "ours, bpe": lambda: train_tokenizer(TEXTS, vocab_size=400),
    "ours, unigram": lambda: train_tokenizer(TEXTS, vocab_size=300, model_type="unigram"),
    "like Llama's": lambda: train_foreign(
        model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    ),
    "with pieces of the user's": lambda: train_foreign(
        model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<tool>", "fox"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def tokenizers(request, tmp_path_factory):
    """A SentencePiece tokenizer, and its export as transformers loads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = folder / "tokenizer.model"
    model.write_bytes(MODELS[request.param]())
    special = export_tokenizer("SentencePieceTokenizer", model, folder)
    assert special == {"bos_token_id": 2, "eos_token_id": 2}
    return load_tokenizer("SentencePieceTokenizer", model), AutoTokenizer.from_pretrained(folder)


@given(text=st.text(max_size=60) | st.text(alphabet="the foxjmps▁ \n12é日<tool>", max_size=60))
def test_same_ids(tokenizers, text):
    original, exported = tokenizers
    assume(not ("<" in text and ">" in text))  # may spell a special piece, which transformers treats as that piece
    assert exported(text)["input_ids"] == original.encode_batch([text])[0].tolist()


def test_special_ids(tokenizers):
    """The id that ends a document also serves as the id that begins a text."""
    original, exported = tokenizers
    assert exported.eos_token_id == exported.bos_token_id == original.eod_id == 2
    assert exported.unk_token_id == 0
    assert len(exported) == original.vocab_size


def test_decodes_what_it_encoded(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODELS["ours, bpe"]())
    export_tokenizer("SentencePieceTokenizer", tmp_path / "tokenizer.model", tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "  two\n\n\tlines \x07 👩‍👩‍👧"):
        assert exported.decode(exported(text)["input_ids"]) == text


def test_hugging_face_tokenizer_is_copied(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODELS["like Llama's"]())
    export_tokenizer("SentencePieceTokenizer", tmp_path / "tokenizer.model", tmp_path / "first")
    special = export_tokenizer("HuggingFaceTokenizer", tmp_path / "first", tmp_path / "second")
    assert special == {"bos_token_id": 2, "eos_token_id": 2}
    first, second = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize(
    ("name", "token"), [("tokenizer_config.json", "sep_token"), ("special_tokens_map.json", "eos_token")]
)
def test_special_ids_of_a_hugging_face_tokenizer(name, token, tmp_path):
    """Transformers does not read the end of text from these settings, with which documents end in training data."""
    (tmp_path / "tokenizer.model").write_bytes(MODELS["like Llama's"]())
    export_tokenizer("SentencePieceTokenizer", tmp_path / "tokenizer.model", tmp_path / "first")
    (tmp_path / "second").mkdir()
    (tmp_path / "first/tokenizer.json").rename(tmp_path / "second/tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", token: "</s>"}
    (tmp_path / "second" / name).write_text(json.dumps(settings))
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path / "second").eod_id == 2
    special = export_tokenizer("HuggingFaceTokenizer", tmp_path / "second", tmp_path / "third")
    assert special == {"bos_token_id": None, "eos_token_id": 2}
    assert AutoTokenizer.from_pretrained(tmp_path / "third").eos_token_id == 2


def test_model_that_cannot_be_expressed_is_refused(tmp_path):
    """Transformers has no equal of a model whose pieces are whole words."""
    (tmp_path / "tokenizer.model").write_bytes(train_foreign(model_type="word", vocab_size=30))
    with pytest.raises(UserError, match="cannot be expressed in transformers"):
        export_tokenizer("SentencePieceTokenizer", tmp_path / "tokenizer.model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_without_a_tokenizer(tmp_path):
    assert export_tokenizer("NullTokenizer", "", tmp_path) == {"bos_token_id": None, "eos_token_id": None}
    assert not list(tmp_path.iterdir())


def test_unknown_type_is_named(tmp_path):
    with pytest.raises(UserError, match="TikTokenizer"):
        export_tokenizer("TikTokenizer", "x", tmp_path)
