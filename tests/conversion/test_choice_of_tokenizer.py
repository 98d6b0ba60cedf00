"""A converted model has the tokenizer that it was trained with, although the file at its path may be another by now."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from support.small_moe import make_mask, random_visible_sets
from support.tiny_maskmoe import NUM_EXPERTS, NUM_LAYERS, make_config, make_model
from transformers import AutoTokenizer

from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface, upcycle_model
from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.settings import Settings, UpcycleSettings
from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask

VOCAB_SIZE = 300
WORDS = ("apple banana cherry delta echo fig", "xylophone quartz jigsaw knight waltz vortex")
TEXT = "banana apple knight"


def write_sentencepiece(path: Path, words: str) -> None:
    drawn = np.random.default_rng(0).choice(words.split(), (200, 8))
    path.write_bytes(train_tokenizer(map(" ".join, drawn), VOCAB_SIZE, num_threads=1))


def write_huggingface(path: Path, words: str) -> None:
    path.mkdir(exist_ok=True)
    write_sentencepiece(path / "model", words)
    export_tokenizer("SentencePieceTokenizer", path / "model", path)


@dataclass(frozen=True)
class Kind:
    """A type of tokenizer: how to write one, to compute its digest, and to encode with its library."""

    name: str
    write: Callable[[Path, str], None]
    digest: Callable[[Path], str]
    encode: Callable[[Path], list[int]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


KINDS = (
    Kind(
        "SentencePieceTokenizer",
        write_sentencepiece,
        sha256,
        lambda path: SentencePieceProcessor(model_file=str(path)).encode(TEXT),
    ),
    Kind(
        "HuggingFaceTokenizer",
        write_huggingface,
        lambda path: sha256(path / "tokenizer.json"),
        lambda path: AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"],
    ),
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request) -> Kind:
    return request.param


@pytest.fixture
def right(kind, tmp_path) -> Path:
    """The tokenizer that the model was trained with, which has moved."""
    kind.write(tmp_path / "right", WORDS[0])
    return tmp_path / "right"


@pytest.fixture
def checkpoint(kind, right, tmp_path) -> Path:
    """A checkpoint that was trained with the tokenizer `right` when it was at the path `tokenizer`."""
    mask = make_mask(random_visible_sets(0, NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS, None), NUM_LAYERS)
    make_model(mask).save_pretrained(tmp_path / "model")
    return trained(tmp_path / "model", tmp_path / "run", kind)


def trained(model: Path, save: Path, kind: Kind) -> Path:
    """Write a checkpoint of a model in transformers' format, with the digest of the tokenizer; return the folder."""
    path = save.parent / "tokenizer"
    kind.write(path, WORDS[0])
    huggingface_to_megatron(Settings(model, save, tokenizer_type=kind.name, tokenizer_model=str(path)))
    assert args_of(save).tokenizer_sha256 == kind.digest(path) == kind.digest(save.parent / "right")
    return save


def replace_tokenizer(kind: Kind, checkpoint: Path) -> str:
    """Write another tokenizer to the path that the checkpoint names; return the path."""
    kind.write(checkpoint.parent / "tokenizer", WORDS[1])
    return str(checkpoint.parent / "tokenizer")


def args_of(folder: Path):
    return open_megatron(folder / "release").args


def test_export_refuses_another_tokenizer(kind, right, checkpoint, tmp_path):
    other = replace_tokenizer(kind, checkpoint)
    digests = rf"\(sha256 {kind.digest(Path(other))[:12]}…\).*\(sha256 {kind.digest(right)[:12]}…\)"
    for flags in ({}, {"tokenizer_model": other}):
        with pytest.raises(UserError, match=f"{other} of {checkpoint} {digests}; pass --tokenizer-model"):
            megatron_to_huggingface(Settings(checkpoint, tmp_path / "out", **flags))
        assert not (tmp_path / "out").exists()


def test_export_takes_the_file_that_has_moved(kind, right, checkpoint, tmp_path):
    replace_tokenizer(kind, checkpoint)
    megatron_to_huggingface(Settings(checkpoint, tmp_path / "out", tokenizer_model=str(right)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == kind.encode(right)
    megatron_to_huggingface(Settings(checkpoint, tmp_path / "without", tokenizer_type="NullTokenizer"))
    assert not (tmp_path / "without/tokenizer.json").exists()


def test_import_names_the_tokenizer_of_training_or_copies_its_export(kind, right, checkpoint, tmp_path):
    megatron_to_huggingface(Settings(checkpoint, tmp_path / "exported"))
    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "same"))
    same = args_of(tmp_path / "same")
    assert (same.tokenizer_model, same.tokenizer_sha256) == (str(tmp_path / "tokenizer"), kind.digest(right))

    other = replace_tokenizer(kind, checkpoint)
    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "copied"))
    copied = args_of(tmp_path / "copied")
    assert (copied.tokenizer_type, Path(copied.tokenizer_model).parent) == ("HuggingFaceTokenizer", tmp_path / "copied")
    assert copied.tokenizer_sha256 == sha256(tmp_path / "exported/tokenizer.json")
    assert AutoTokenizer.from_pretrained(copied.tokenizer_model)(TEXT)["input_ids"] == kind.encode(right)

    huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "chosen", tokenizer_model=other))
    assert args_of(tmp_path / "chosen").tokenizer_sha256 == kind.digest(Path(other)) != kind.digest(right)

    (tmp_path / "exported/tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{other} of .* is not the file that the model was trained with"):
        huggingface_to_megatron(Settings(tmp_path / "exported", tmp_path / "out"))


def test_upcycling_keeps_the_tokenizer_of_the_dense_model(kind, right, tmp_path):
    dense = MaskMoEForCausalLM(make_config(vocab_size=VOCAB_SIZE, mlp_layer_types=["dense"] * NUM_LAYERS))
    dense.save_pretrained(tmp_path / "dense")
    checkpoint = trained(tmp_path / "dense", tmp_path / "run", kind)
    mask = build_routing_mask(MaskRecipe.from_preset("smoe", 4, NUM_LAYERS), vocab_size=VOCAB_SIZE)
    other = replace_tokenizer(kind, checkpoint)
    with pytest.raises(UserError, match=f"{other} of {checkpoint} .* is not the file"):
        upcycle_model(Settings(checkpoint, tmp_path / "out"), UpcycleSettings(4), mask, to_megatron=False)
    settings = Settings(checkpoint, tmp_path / "sparse", tokenizer_model=str(right))
    upcycle_model(settings, UpcycleSettings(4), mask, to_megatron=False)
    # The digest came along: without the right file, the next conversion copies the tokenizer beside the model.
    kind.write(right, WORDS[1])
    huggingface_to_megatron(Settings(tmp_path / "sparse", tmp_path / "again"))
    assert args_of(tmp_path / "again").tokenizer_sha256 == sha256(tmp_path / "sparse/tokenizer.json")
