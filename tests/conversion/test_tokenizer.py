"""Models get the tokenizer that they were trained with, and its export gives the same ids."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support.small_moe import make_mask, random_visible_sets
from support.tiny_maskmoe import NUM_EXPERTS, NUM_LAYERS, make_config, make_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface, upcycle_model
from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.settings import Settings, UpcycleSettings
from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask

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


def test_class_that_takes_only_the_vocabulary_from_the_file(tmp_path):
    """The file merges whole sentences, which `GPT2Tokenizer` cuts into words."""
    original = Tokenizer(models.BPE())
    original.pre_tokenizer = byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "the end of the end. " * 20
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    original.train_from_iterator([text], trainer)
    original.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer"} | dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<end>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = load_tokenizer("HuggingFaceTokenizer", tmp_path).encode_batch([text])[0].tolist()
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] != ids
    special = export_tokenizer("HuggingFaceTokenizer", tmp_path, tmp_path / "out")
    assert special == {"bos_token_id": 0, "eos_token_id": 0}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == ids


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


VOCAB_SIZE = 300
WORD_LISTS = ("apple banana cherry delta echo fig", "xylophone quartz jigsaw knight waltz vortex")
TEXT = "banana apple knight"


def write_sentencepiece(path: Path, words: str) -> None:
    drawn = np.random.default_rng(0).choice(words.split(), (200, 8))
    path.write_bytes(train_tokenizer(map(" ".join, drawn), VOCAB_SIZE, num_threads=1))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode(model: Path) -> list[int]:
    return SentencePieceProcessor(model_file=str(model)).encode(TEXT)


@pytest.fixture
def right(tmp_path) -> Path:
    """The tokenizer that the model was trained with, which has moved."""
    write_sentencepiece(tmp_path / "right", WORD_LISTS[0])
    return tmp_path / "right"


@pytest.fixture
def checkpoint(right, tmp_path) -> Path:
    """A checkpoint that was trained with the tokenizer `right` when it was at the path `tokenizer`."""
    mask = make_mask(random_visible_sets(0, NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS, None), NUM_LAYERS)
    make_model(mask).save_pretrained(tmp_path / "model")
    return trained(tmp_path / "model", tmp_path / "run")


def trained(model: Path, save: Path) -> Path:
    """Write a checkpoint of a model in transformers' format, with the digest of the tokenizer; return the folder."""
    path = save.parent / "tokenizer"
    write_sentencepiece(path, WORD_LISTS[0])
    huggingface_to_megatron(Settings(model, save, tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path)))
    assert args_of(save).tokenizer_sha256 == sha256(path) == sha256(save.parent / "right")
    return save


def replace_tokenizer(checkpoint: Path) -> str:
    """Write another tokenizer to the path that the checkpoint names; return the path."""
    write_sentencepiece(checkpoint.parent / "tokenizer", WORD_LISTS[1])
    return str(checkpoint.parent / "tokenizer")


def args_of(folder: Path):
    return open_megatron(folder / "release").args


def test_export_refuses_another_tokenizer(right, checkpoint, tmp_path):
    other = replace_tokenizer(checkpoint)
    digests = rf"\(sha256 {sha256(Path(other))[:12]}…\).*\(sha256 {sha256(right)[:12]}…\)"
    for flags in ({}, {"tokenizer_model": other}):
        with pytest.raises(UserError, match=f"{other} of {checkpoint} {digests}; pass --tokenizer-model"):
            megatron_to_huggingface(Settings(checkpoint, tmp_path / "out", **flags))
        assert not (tmp_path / "out").exists()


def test_export_takes_the_file_that_has_moved(right, checkpoint, tmp_path):
    replace_tokenizer(checkpoint)
    megatron_to_huggingface(Settings(checkpoint, tmp_path / "out", tokenizer_model=str(right)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == encode(right)
    megatron_to_huggingface(Settings(checkpoint, tmp_path / "without", tokenizer_type="NullTokenizer"))
    assert not (tmp_path / "without/tokenizer.json").exists()


def test_import_names_the_tokenizer_of_training_or_copies_its_export(right, checkpoint, tmp_path):
    megatron_to_huggingface(Settings(checkpoint, tmp_path / "exported"))
    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "same"))
    same = args_of(tmp_path / "same")
    assert (same.tokenizer_model, same.tokenizer_sha256) == (str(tmp_path / "tokenizer"), sha256(right))

    other = replace_tokenizer(checkpoint)
    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "copied"))
    copied = args_of(tmp_path / "copied")
    assert (copied.tokenizer_type, Path(copied.tokenizer_model).parent) == ("HuggingFaceTokenizer", tmp_path / "copied")
    assert copied.tokenizer_sha256 == sha256(tmp_path / "exported/tokenizer.json")
    assert AutoTokenizer.from_pretrained(copied.tokenizer_model)(TEXT)["input_ids"] == encode(right)

    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "chosen", tokenizer_model=other))
    assert args_of(tmp_path / "chosen").tokenizer_sha256 == sha256(Path(other)) != sha256(right)

    for name in ("tokenizer.json", "integrity.json"):
        (tmp_path / "exported" / name).unlink()
    with pytest.raises(UserError, match=f"{other} of .* is not the file that the model was trained with"):
        huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "out"))


def test_upcycling_keeps_the_tokenizer_of_the_dense_model(right, tmp_path):
    dense = MaskMoEForCausalLM(make_config(vocab_size=VOCAB_SIZE, mlp_layer_types=["dense"] * NUM_LAYERS))
    dense.save_pretrained(tmp_path / "dense")
    checkpoint = trained(tmp_path / "dense", tmp_path / "run")
    mask = build_routing_mask(MaskRecipe.from_preset("smoe", 4, NUM_LAYERS), vocab_size=VOCAB_SIZE)
    other = replace_tokenizer(checkpoint)
    with pytest.raises(UserError, match=f"{other} of {checkpoint} .* is not the file"):
        upcycle_model(Settings(checkpoint, tmp_path / "out"), UpcycleSettings(4), mask, to_megatron=False)
    settings = Settings(checkpoint, tmp_path / "sparse", tokenizer_model=str(right))
    upcycle_model(settings, UpcycleSettings(4), mask, to_megatron=False)
    # The digest came along: without the right file, the next conversion copies the tokenizer beside the model.
    write_sentencepiece(right, WORD_LISTS[1])
    huggingface_to_megatron(Settings(tmp_path / "sparse", tmp_path / "again"))
    assert args_of(tmp_path / "again").tokenizer_sha256 == sha256(tmp_path / "sparse/tokenizer.json")
