"""Models get the tokenizer that they were trained with, and its export gives the same ids."""

import hashlib
import io
import json
from argparse import Namespace
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from support.small_moe import make_mask, random_visible_sets
from support.tiny_maskmoe import NUM_EXPERTS, NUM_LAYERS, make_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.settings import Settings
from maskmoe.conversion.tokenizer import choose_tokenizer, export_tokenizer
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
    # The id that ends a document also serves as the id that begins a text.
    special = export_tokenizer("SentencePieceTokenizer", model, folder)
    assert special == {"bos_token_id": 2, "eos_token_id": 2}
    return load_tokenizer("SentencePieceTokenizer", model), AutoTokenizer.from_pretrained(folder)


@given(text=st.text(max_size=60) | st.text(alphabet="the foxjmps▁ \n12é日<tool>", max_size=60))
def test_same_ids(tokenizers, text):
    original, exported = tokenizers
    assume(not ("<" in text and ">" in text))  # may spell a special piece, which transformers treats as that piece
    assert exported(text)["input_ids"] == original.encode_batch([text])[0].tolist()


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


ORIGINAL, OTHER = b"the tokenizer of training", b"another tokenizer"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def trained(tmp_path) -> Namespace:
    """The arguments of a run with the tokenizer ORIGINAL, which is at its path."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(ORIGINAL)
    return Namespace(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path), tokenizer_sha256=sha256(ORIGINAL)
    )


def model_folder(folder: Path, origin: bytes | None = None) -> Path:
    """Return the folder of a model with a tokenizer that records from what it was exported, or has no record."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    record = {} if origin is None else {"made_from_sha256": sha256(origin)}
    (folder / "tokenizer_config.json").write_text(json.dumps(record))
    return folder


def test_the_tokenizer_of_training_or_its_export_is_found(trained, tmp_path):
    exported = model_folder(tmp_path / "exported", ORIGINAL)
    at_its_path = ("SentencePieceTokenizer", trained.tokenizer_model)
    assert choose_tokenizer(trained, Settings(exported, tmp_path)) == at_its_path
    for change in (lambda path: path.write_bytes(OTHER), Path.unlink):
        change(Path(trained.tokenizer_model))
        assert choose_tokenizer(trained, Settings(exported, tmp_path)) == ("HuggingFaceTokenizer", str(exported))
        for number, origin in enumerate((OTHER, None)):
            folder = model_folder(tmp_path / f"{change.__name__} {number}", origin)
            with pytest.raises(UserError, match="--tokenizer-model"):
                choose_tokenizer(trained, Settings(folder, tmp_path))


def test_a_model_of_unknown_training_has_the_tokenizer_in_its_folder_or_needs_a_flag(tmp_path):
    folder = model_folder(tmp_path / "model")
    assert choose_tokenizer(None, Settings(folder, tmp_path)) == ("HuggingFaceTokenizer", str(folder))
    with pytest.raises(UserError, match="--tokenizer-type NullTokenizer"):
        choose_tokenizer(None, Settings(tmp_path, tmp_path))
    settings = Settings(tmp_path, tmp_path, tokenizer_type="NullTokenizer")
    assert choose_tokenizer(None, settings) == ("NullTokenizer", None)
    assert choose_tokenizer(Namespace(tokenizer_type="NullTokenizer"), Settings(folder, tmp_path))[1] is None


@pytest.mark.parametrize("flags", [{"tokenizer_model": "file"}, {"tokenizer_type": "SentencePieceTokenizer"}], ids=str)
def test_both_flags_name_a_tokenizer(tmp_path, flags):
    with pytest.raises(UserError, match="both flags, --tokenizer-type and --tokenizer-model"):
        choose_tokenizer(None, Settings(tmp_path, tmp_path, **flags))


def test_an_export_refuses_another_tokenizer_than_that_of_training(trained, tmp_path):
    (tmp_path / "moved").write_bytes(ORIGINAL)
    (tmp_path / "other").write_bytes(OTHER)
    moved, other = (Settings(tmp_path, tmp_path, tokenizer_model=str(tmp_path / name)) for name in ("moved", "other"))
    assert choose_tokenizer(trained, moved) == ("SentencePieceTokenizer", str(tmp_path / "moved"))
    with pytest.raises(UserError, match="is not the tokenizer that"):
        choose_tokenizer(trained, other)
    assert choose_tokenizer(trained, other, may_replace=True) == ("SentencePieceTokenizer", str(tmp_path / "other"))


def args_of(folder: Path) -> Namespace:
    return open_megatron(folder / "release").args


def test_a_model_carries_its_tokenizer_to_transformers_and_back(tmp_path):
    """Without the original, the checkpoint gets a copy of the export, which gives the same ids."""
    original = tmp_path / "tokenizer.model"
    original.write_bytes(train_tokenizer(TEXTS, 300))
    mask = make_mask(random_visible_sets(0, NUM_LAYERS, 300, NUM_EXPERTS, None), NUM_LAYERS)
    make_model(mask).save_pretrained(tmp_path / "made")
    tokenizer = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(original)}
    huggingface_to_megatron(Settings(tmp_path / "made", tmp_path / "run", **tokenizer))
    megatron_to_huggingface(Settings(tmp_path / "run", tmp_path / "exported"))
    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "same"))
    same = args_of(tmp_path / "same")
    assert (same.tokenizer_model, same.tokenizer_sha256) == (str(original), sha256(original.read_bytes()))
    ids = load_tokenizer("SentencePieceTokenizer", original).encode_batch(TEXTS)
    original.unlink()
    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "copied"))
    copied = args_of(tmp_path / "copied")
    assert copied.tokenizer_sha256 == sha256((tmp_path / "copied/tokenizer/tokenizer.json").read_bytes())
    copy = load_tokenizer(copied.tokenizer_type, copied.tokenizer_model)
    assert [each.tolist() for each in copy.encode_batch(TEXTS)] == [each.tolist() for each in ids]
    megatron_to_huggingface(Settings(tmp_path / "copied", tmp_path / "again"))
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXTS[5])["input_ids"] == ids[5].tolist()
