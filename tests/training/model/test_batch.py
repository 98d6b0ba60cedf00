"""Samples of datasets: their cached indices, and documents that are rearranged to fill in the middle."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import add_megatron_arguments
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from support.datasets import FILL_IN_MIDDLE_TOKENS, predictable_ids, write_character_tokenizer, write_documents

from maskmoe.errors import UserError
from maskmoe.training.model import batch
from maskmoe.training.model.batch import (
    FillInMiddleDataset,
    GPTDataset,
    check_fill_in_middle_tokens,
    fill_in_middle_tokens,
)

VOCAB_SIZE, SAMPLE = 300, 400
PREFIX, MIDDLE, SUFFIX, PAD, END = range(VOCAB_SIZE - 5, VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer, and with a dataset whose documents end with END and hold no other tokens."""
    folder = tmp_path_factory.mktemp("fim")
    write_character_tokenizer(folder / "tokenizer", VOCAB_SIZE)
    documents = predictable_ids(np.random.default_rng(0), PREFIX)
    write_documents(folder / "data", [np.append(document, END) for document in documents])
    return folder


def arguments(folder: Path, *flags: str) -> argparse.Namespace:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]
    return parser.parse_args([*tokenizer, *flags], argparse.Namespace(rank=0))


def build(kind: type[GPTFIMDataset], folder: Path, rate: float, spm_rate: float) -> GPTFIMDataset:
    """Build a dataset of one epoch of the documents in `folder`."""
    config = GPTFIMDatasetConfig(
        random_seed=3,
        sequence_length=SAMPLE,
        blend=([str(folder / "data")], None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=build_tokenizer(arguments(folder)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        fim_rate=rate,
        fim_spm_rate=spm_rate,
        **fill_in_middle_tokens(arguments(folder)),
    )
    data = IndexedDataset(str(folder / "data"))
    return kind(data, str(folder / "data"), np.arange(len(data)), None, Split.train, config)


def tokens_of(dataset: GPTFIMDataset, index: int) -> list[int]:
    return dataset[index]["tokens"].tolist()


def put_in_order(document: list[int], spm: bool) -> list[int]:
    """Return a document with the middle between prefix and suffix again."""
    if spm:
        assert document[:2] == [PREFIX, SUFFIX]
        suffix, before = document[2 : document.index(MIDDLE)], document[document.index(MIDDLE) + 1 :]
        return before + suffix
    assert document[0] == PREFIX
    suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
    return document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle]


@pytest.mark.parametrize("spm", [False, True])
def test_documents_are_rearranged(folder: Path, spm: bool) -> None:
    """The first sample begins with a whole document; its last document is cut off."""
    plain, filled = (build(FillInMiddleDataset, folder, rate, float(spm)) for rate in (0, 1))
    first = int(np.argmin(filled.shuffle_index))
    expected, found = tokens_of(plain, first), tokens_of(filled, first)
    assert not {PREFIX, MIDDLE, SUFFIX, PAD} & set(expected)
    assert len(found) == SAMPLE
    assert found.count(END) >= 2
    rearranged = []
    while END in found:
        end = found.index(END)
        rearranged += [*put_in_order(found[:end], spm), END]
        found = found[end + 1 :]
    assert rearranged == expected[: len(rearranged)]


def test_samples_depend_on_their_index_only(folder: Path) -> None:
    def differing(kind: type[GPTFIMDataset]) -> int:
        """Count the samples that differ if they are read in another order."""
        forwards, backwards = (build(kind, folder, 0.5, 0.5) for _ in range(2))
        samples = [tokens_of(forwards, index) for index in range(len(forwards))]
        again = [tokens_of(backwards, index) for index in reversed(range(len(backwards)))]
        return sum(sample != other for sample, other in zip(samples, reversed(again), strict=True))

    assert differing(FillInMiddleDataset) == 0
    assert differing(GPTFIMDataset) > 3


def test_samples_of_equal_text_are_cut_in_different_places(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    document = np.append(np.arange(SAMPLE - 1) % PREFIX, END)
    write_documents(tmp_path / "data", [document] * 12)
    dataset = build(FillInMiddleDataset, tmp_path, 1, 0)
    assert len(dataset) >= 10
    assert len({tokens_of(dataset, index).index(SUFFIX) for index in range(len(dataset))}) > 5


def cached_files(folder: Path) -> dict[str, int]:
    """Return the time of the last change of each file by its name."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}


@pytest.fixture
def two_documents(folder: Path, tmp_path: Path) -> Path:
    """Return a folder like `folder` whose documents have one sample each."""
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    write_documents(tmp_path / "data", [np.full(SAMPLE, 1), np.full(SAMPLE, 2)])
    return tmp_path


@pytest.mark.parametrize("kind", [GPTDataset, FillInMiddleDataset])
@pytest.mark.parametrize(
    "lengths", [(SAMPLE, SAMPLE, SAMPLE), (100, 100, 3 * SAMPLE), (2 * SAMPLE, 99), (2 * SAMPLE,), (1,)]
)
def test_indices_of_an_earlier_dataset_are_not_used(
    two_documents: Path, kind: type[GPTFIMDataset], lengths: tuple[int, ...]
) -> None:
    build(kind, two_documents, rate=0, spm_rate=0)
    new = [np.full(length, number) for number, length in enumerate(lengths, start=5)]
    write_documents(two_documents / "data", new)
    dataset = build(kind, two_documents, rate=0, spm_rate=0)
    tokens = [token for index in range(len(dataset)) for token in tokens_of(dataset, index)]
    assert len(tokens) == max(0, sum(lengths) - 1) // SAMPLE * SAMPLE
    assert set(tokens) <= {5, 6, 7}
    written = cached_files(two_documents)
    build(kind, two_documents, rate=0, spm_rate=0)
    assert cached_files(two_documents) == written
    assert len(written) == 8


def test_padding_of_a_sample_leaves_other_samples_their_loss(folder: Path, tmp_path: Path) -> None:
    """The first document has padding, and is read first."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    write_documents(tmp_path / "data", [np.where(np.arange(SAMPLE) < 9, 1, PAD), *[np.full(SAMPLE, 1)] * 3])
    dataset = build(GPTDataset, tmp_path, rate=0, spm_rate=0)
    dataset._pad_token_id = PAD
    has_padding = [PAD in dataset._query_document_sample_shuffle_indices(index)[0] for index in range(len(dataset))]
    order = sorted(range(len(dataset)), key=lambda index: not has_padding[index])
    weights = [dataset[index]["loss_mask"].sum().item() for index in order]
    assert weights[0] < SAMPLE
    assert weights[1:] == [SAMPLE] * (len(dataset) - 1)


@pytest.mark.parametrize(
    ("flags", "begin", "problem"),
    [
        ("--fim-suffix-token <SUF>", None, "has no token <SUF>, which --fim-data needs.*--fim-suffix-token"),
        (f"--fim-eod-token {FILL_IN_MIDDLE_TOKENS[0]}", None, "they end with <.*: pass --fim-eod-token '<"),
        ("", FILL_IN_MIDDLE_TOKENS[0], "adds to each text.*: pass --tokenizer-hf-no-include-special-tokens"),
    ],
    ids=["missing token", "other end", "begin of texts"],
)
def test_tokenizer_that_cannot_fill_in_the_middle_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: str, begin: str | None, problem: str
) -> None:
    built = build_tokenizer(arguments(folder))
    monkeypatch.setattr(batch, "get_tokenizer", lambda: built)
    check_fill_in_middle_tokens(arguments(folder))
    if begin is not None:
        template = tokenizers.processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, PREFIX)])
        built._tokenizer.tokenizer.backend_tokenizer.post_processor = template
    with pytest.raises(UserError, match=problem):
        check_fill_in_middle_tokens(arguments(folder, *flags.split()))
