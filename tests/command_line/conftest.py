"""Fixtures: a folder with one small file or folder of each kind that commands read."""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_lines import forget_megatrons_globals, run_command
from support.datasets import write_inputs
from support.paths import EXPORTED_MODEL, ROOT

from maskmoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="session")
def original_workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, tokenizers, a dataset, counts, a mask, an exported model and its Megatron checkpoint."""
    # These modules need the prepared process.
    from support.tiny_maskmoe import make_model

    folder = tmp_path_factory.mktemp("workshop")
    (folder / "loop").symlink_to("loop")
    (folder / "huggingface").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXPORTED_MODEL / name, folder / "huggingface")
    tokenizer = HuggingFaceTokenizer(folder / "huggingface")
    mask = write_inputs(folder, VOCAB_SIZE, 4, 2, tokenizer)
    make_model(mask, num_hidden_layers=2).save_pretrained(folder / "model")
    for path in (folder / "huggingface").iterdir():
        shutil.copy(path, folder / "model")
    shutil.copy(ROOT / "launch" / "models" / "laptop.yaml", folder / "laptop.yaml")
    shutil.copy(ROOT / "launch" / "suites" / "laptop.yaml", folder / "suite.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        converted = run_command("convert", "hf-to-megatron", "--load", "model", "--save", "checkpoints")
    assert converted.code == 0, converted.errors
    assert SentencePieceTokenizer(folder / "tokenizer.model").vocab_size == tokenizer.vocab_size == VOCAB_SIZE
    return folder


@pytest.fixture
def workshop(original_workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shared folder, which is the current folder; tests change nothing in it."""
    monkeypatch.chdir(original_workshop)
    forget_megatrons_globals()
    yield original_workshop
    forget_megatrons_globals()


@pytest.fixture(scope="session")
def training_parser() -> argparse.ArgumentParser:
    """The parser of `maskmoe pretrain`, which takes a while to make."""
    from megatron.training.arguments import add_megatron_arguments

    from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return add_pretraining_arguments(add_maskmoe_arguments(parser))
