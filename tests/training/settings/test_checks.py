"""The checks of a run find bad input, and name it in one line."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.datasets import build_mask, count_ids, write_documents

from maskmoe.data.tokenizer import SentencePieceTokenizer
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError, megatrons_checks
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask

SENTENCE_PIECE = "--tokenizer-type SentencePieceTokenizer --tokenizer-model"

MASK = "mask.safetensors"

# Flags, routing mask and parts of the error line of each case, by its name. `bad_files` makes the files in `bad/`.
CASES = {
    "altered mask": ("", "bad/altered.safetensors", ["bad/altered.safetensors"]),
    "setting with which Megatron exits": ("--checkpoint-activations", MASK, ["Megatron ends without an error"]),
    "no mask": ("", None, ["no routing mask: pass --routing-mask"]),
    **{
        f"dataset of another {name}": (
            f"--tokenizer-type {name} --tokenizer-model bad/ours.model --data-path bad/theirs",
            "bad/without_counts.safetensors",
            ["dataset bad/theirs", "theirs.model", "bad/ours.model"],
        )
        for name in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    },
    "no dataset": ("--data-path", MASK, ["--data-path"]),
    "too few documents for the split": ("--data-path bad/one_document", MASK, ["one_document", "--split 90,10,0"]),
    "no training data": ("--split 0,100,0", MASK, ["no training data", "--split"]),
    "no validation data": ("--split 100,0,0", MASK, ["no validation data", "--eval-iters 0"]),
    "counts of another tokenizer": (
        f"{SENTENCE_PIECE} bad/ours.model --data-path bad/unknown",
        "bad/of_their_counts.safetensors",
        ["counts", "theirs.model", "bad/ours.model"],
    ),
    "missing tokenizer model": (f"{SENTENCE_PIECE} nowhere.model", MASK, ["nowhere.model"]),
}


@pytest.fixture(scope="module")
def bad_files(workplace) -> Path:
    """Make the damaged and unfitting files of the cases."""
    folder = workplace.folder / "bad"
    folder.mkdir()
    write_documents(folder / "one_document", [np.full(120, 3)], np.int32)
    write_altered_mask(workplace.folder, folder)
    write_tokenizers(folder)
    return folder


def write_altered_mask(source: Path, folder: Path) -> None:
    mask = (source / "mask.safetensors").read_bytes()
    assert mask.count(b'\\"seed\\": 1') == 1 or mask.count(b'\\"seed\\":1') == 1
    altered = mask.replace(b'\\"seed\\": 1', b'\\"seed\\": 2').replace(b'\\"seed\\":1', b'\\"seed\\":2')
    (folder / "altered.safetensors").write_bytes(altered)


def write_tokenizers(folder: Path) -> None:
    """Write two SentencePiece models of one size, datasets with and without a record of one model, and masks."""
    documents = [np.full(120, 3)] * 10
    for name, letters in (("ours", "abcdefgh"), ("theirs", "klmnopqr")):
        (folder / f"{name}.model").write_bytes(train_tokenizer([f"{letters} " * 50], vocab_size=270, num_threads=1))
    tokenizer = SentencePieceTokenizer(folder / "theirs.model")
    write_documents(folder / "theirs", documents, np.int32, tokenizer.record())
    write_documents(folder / "unknown", documents, np.int32)
    recipe = MaskRecipe(8, 4, "uniform", 0.0)
    counts = count_ids(folder / "theirs", tokenizer.vocab_size)
    build_mask(counts, 8, 4, "uniform", frequent_mass=0.0, frequent_visible_experts=None).save(
        folder / "of_their_counts.safetensors"
    )
    build_routing_mask(recipe, vocab_size=tokenizer.vocab_size).save(folder / "without_counts.safetensors")


@pytest.fixture
def error_of(parse) -> Callable[..., str]:
    """Check a run in this process, and return its error."""

    def error_of(flags: str, **settings: object) -> str:
        with pytest.raises(UserError) as error:
            parse(flags, **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    return error_of


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_found_by_the_checks(case, bad_files, error_of):
    flags, mask, parts = CASES[case]
    message = error_of(flags, mask=mask, saves=True)
    for part in parts:
        assert part in message


def test_exit_of_megatron_is_an_error():
    with pytest.raises(UserError, match=r"^invalid settings: Megatron ends without an error$"), megatrons_checks():
        sys.exit()


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--data-args-path", None, "No such file"),
        ("--data-args-path", "1 data data ended", "dataset 1: 1.idx does not exist"),
        ("--per-split-data-args-path", '{"train": ["data"], "valid": null}', "'test'"),
        (
            "--per-split-data-args-path",
            '{"train": [0.5, "data", 0.5, "ended"], "valid": null, "test": null}',
            "there are no validation data",
        ),
    ],
)
def test_bad_file_of_data_paths(flag, content, message, error_of, tmp_path):
    path = tmp_path / "paths"
    if content is not None:
        path.write_text(content)
    assert message in error_of(f"{flag} {path}", omits="--data-path", saves=True)
