"""Shuffled datasets hold the same documents in an order that only the seed decides."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.tools import run_tool

from maskmoe.data import indexed_dataset
from maskmoe.data.indexed_dataset import (
    IndexedDatasetWriter,
    copy_shuffled,
    open_tokens,
    read_index,
    read_tokenizer_record,
)
from maskmoe.data.preprocess import preprocess

SUFFIXES = ("bin", "idx", "tokenizer.json")


def documents_of(prefix: Path | str) -> list[list[int]]:
    """Return the token ids of each document, read with the index alone."""
    boundaries = read_index(prefix).document_boundaries
    return [part.tolist() for part in np.split(open_tokens(prefix), boundaries[1:-1])]


def content(prefix: Path | str) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.uint16))
    return prefix


def shuffle(source: Path, target: Path, seed: int) -> list[list[int]]:
    with IndexedDatasetWriter(target, np.uint16) as writer:
        copy_shuffled([source], writer, seed)
    return documents_of(target)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=30).filter(any),
    batch_tokens=st.integers(1, 20),
    seed=st.integers(0, 2**70),
)
def test_same_documents_whatever_the_batches(
    tmp_path: Path, documents: list[list[int]], batch_tokens: int, seed: int
) -> None:
    source = write(tmp_path / "source", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_dataset, "_BATCH_TOKENS", batch_tokens)
        shuffled = shuffle(source, tmp_path / "shuffled", seed)
    assert sorted(shuffled) == sorted(documents)
    assert shuffled == shuffle(source, tmp_path / "again", seed)


def test_the_order_depends_on_the_seed_and_the_number_of_documents(tmp_path: Path) -> None:
    one_token = [[number] for number in range(200)]
    two_tokens = [[number, number] for number in range(200)]
    source = write(tmp_path / "source", one_token)
    shuffled = shuffle(source, tmp_path / "shuffled", 1)
    assert shuffled != one_token
    assert shuffled != shuffle(source, tmp_path / "other", 2)
    # Another dataset with as many documents is shuffled alike.
    alike = shuffle(write(tmp_path / "two", two_tokens), tmp_path / "alike", 1)
    assert [document[0] for document in alike] == [document[0] for document in shuffled]
    # Documents move far: the last tenth comes from everywhere.
    origins = [document[0] for document in shuffled[-20:]]
    assert min(origins) < 60
    assert max(origins) > 140


def test_tool(jsonl: Callable, texts: list[str], sentencepiece_model: Path, tmp_path: Path) -> None:
    documents = [*texts, *texts[-6:] * 50]
    arguments = [
        *("--input", jsonl("a.jsonl", documents), "--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", sentencepiece_model, "--append-eod"),
    ]
    runs = {
        "in_order": ("--workers", 1),
        "first": ("--workers", 1, "--shuffle-seed", 5),
        "again": ("--workers", 3, "--shuffle-seed", 5),
        "other": ("--workers", 1, "--shuffle-seed", 6),
    }
    for name, flags in runs.items():
        result = run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / name, *flags)
        assert result.returncode == 0, result.stderr
        assert f"_text_document: {len(documents)} documents, " in result.stdout
    prefixes = {name: tmp_path / f"{name}_text_document" for name in runs}
    # Nothing but the datasets is left.
    files = {f"{prefix.name}.{suffix}" for prefix in prefixes.values() for suffix in SUFFIXES}
    assert {path.name for path in tmp_path.iterdir()} == files | {"a.jsonl"}

    assert content(prefixes["first"]) == content(prefixes["again"])
    in_order, first, other = (documents_of(prefixes[name]) for name in ("in_order", "first", "other"))
    assert sorted(first) == sorted(in_order) == sorted(other)
    assert first != in_order
    assert first != other
    assert read_tokenizer_record(prefixes["first"]) == read_tokenizer_record(prefixes["in_order"])
    # Megatron's own reader sees the same documents; empty documents have no sequence.
    dataset = IndexedDataset(str(prefixes["first"]))
    assert [dataset[number].tolist() for number in range(len(dataset))] == [ids for ids in first if ids]
    assert len(dataset.document_indices) == len(documents) + 1


def test_all_keys_are_shuffled_alike(sentencepiece_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # Some questions are empty; they have no tokens, but keep their place beside the answers.
    rows = [{"q": "" if number % 3 == 0 else f"text {number}", "a": f"text {number}"} for number in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = preprocess(
        [path], "SentencePieceTokenizer", sentencepiece_model, tmp_path / "out", ["q", "a"], shuffle_seed=1
    )
    questions, answers = (documents_of(summary.prefix) for summary in summaries)
    assert len(questions) == len(answers) == 100
    assert questions.count([]) == 34
    assert all(question in ([], answer) for question, answer in zip(questions, answers, strict=True))
