"""Datasets are written, shuffled and joined: the bytes are Megatron's, and those of one machine's dataset."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import write_documents

from maskmoe.command_line import preprocess_data
from maskmoe.data import dataset_writing
from maskmoe.data.dataset_writing import IndexedDatasetWriter, copy_shuffled, merge_datasets
from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.data.inputs import Shard
from maskmoe.data.preprocess import preprocess
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import count_token_frequency, merge_token_frequencies

SUFFIXES = ("bin", "idx", "tokenizer.json")


def documents_of(prefix: Path | str) -> list[list[int]]:
    """Return the token ids of each document, read with the index alone."""
    boundaries = read_index(prefix).document_boundaries
    return [part.tolist() for part in np.split(open_tokens(prefix), boundaries[1:-1])]


def content(prefix: Path | str) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def shuffle(source: Path, target: Path, seed: int) -> list[list[int]]:
    with IndexedDatasetWriter(target, np.uint16) as writer:
        copy_shuffled([source], writer, seed)
    return documents_of(target)


@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=30).filter(any),
    batch_tokens=st.integers(1, 20),
    seed=st.integers(0, 2**70),
)
def test_same_documents_whatever_the_batches(
    tmp_path: Path, documents: list[list[int]], batch_tokens: int, seed: int
) -> None:
    source = write_documents(tmp_path / "source", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_writing, "_BATCH_TOKENS", batch_tokens)
        shuffled = shuffle(source, tmp_path / "shuffled", seed)
    assert sorted(shuffled) == sorted(documents)
    assert shuffled == shuffle(source, tmp_path / "again", seed)


def test_the_order_depends_on_the_seed_and_the_number_of_documents(tmp_path: Path) -> None:
    one_token = [[number] for number in range(200)]
    two_tokens = [[number, number] for number in range(200)]
    source = write_documents(tmp_path / "source", one_token)
    shuffled = shuffle(source, tmp_path / "shuffled", 1)
    assert shuffled != one_token
    assert shuffled != shuffle(source, tmp_path / "other", 2)
    # Another dataset with as many documents is shuffled alike.
    alike = shuffle(write_documents(tmp_path / "two", two_tokens), tmp_path / "alike", 1)
    assert [document[0] for document in alike] == [document[0] for document in shuffled]
    # Documents move far: the last tenth comes from everywhere.
    origins = [document[0] for document in shuffled[-20:]]
    assert min(origins) < 60
    assert max(origins) > 140


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
    assert not list(tmp_path.glob(".*"))  # the datasets before they were shuffled


def write_json_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, texts: list[str], sentencepiece_model: Path) -> Path:
    """A folder with a dataset `whole`, the same dataset shuffled, and its shards `part-I-of-4`, the last one empty."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / name for name in ("0.parquet", "1.jsonl", "2.jsonl")]
    pq.write_table(pa.table({"text": texts}), paths[0])
    write_json_lines(paths[1], [*texts, *texts[-6:] * 9])
    # The last file is so large that the middle of each file lies in another quarter, and none in the last quarter.
    write_json_lines(paths[2], ["word " * (sum(path.stat().st_size for path in paths[:2]) // 4)])
    arguments = (paths, "SentencePieceTokenizer", sentencepiece_model)
    preprocess(*arguments, folder / "whole", append_eod=True)
    preprocess(*arguments, folder / "shuffled", append_eod=True, shuffle_seed=7)
    for index in range(4):
        (writer,) = preprocess(*arguments, folder / "part", append_eod=True, shard=Shard(index, 4))
        assert (writer.num_documents == 0) == (index == 3)
    return folder


def parts(folder: Path) -> list[str]:
    return [f"{folder}/part-0000{index}-of-00004_text_document" for index in range(4)]


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("suffix", ["", ".idx"])
def test_merging_gives_the_dataset_of_one_machine(
    shards: Path,
    tmp_path: Path,
    seed: int | None,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(dataset_writing, "_BATCH_TOKENS", 5000)
    names = [f"{part}{suffix}" for part in parts(shards)]
    shuffle = [] if seed is None else ["--shuffle-seed", str(seed)]
    monkeypatch.setattr(sys, "argv", ["x", "--merge", *names, "--output-prefix", f"{tmp_path}/merged", *shuffle])
    preprocess_data.main()
    assert capsys.readouterr().out.startswith(f"{tmp_path}/merged: ")
    assert content(tmp_path / "merged") == content(shards / f"{'whole' if seed is None else 'shuffled'}_text_document")
    assert {path.name for path in tmp_path.iterdir()} == {f"merged.{suffix}" for suffix in SUFFIXES}


@pytest.mark.parametrize("problem", ["differ", "hold no tokens"])
def test_a_refused_merging_keeps_an_earlier_dataset(tmp_path: Path, problem: str) -> None:
    arguments = ([str(write_documents(tmp_path / name, [[1]])) for name in ("a", "b")], f"{tmp_path}/merged")
    merge_datasets(*arguments)
    write_documents(tmp_path / "a", [])
    write_documents(tmp_path / "b", [], dtype=np.int32 if problem == "differ" else np.uint16)
    before = {path: path.read_bytes() for path in tmp_path.glob("merged*")}
    assert len(before) == 2
    with pytest.raises(UserError, match=problem):
        merge_datasets(*arguments, force=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("merged*")} == before


# ---- Counts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counts(shards: Path) -> list[str]:
    """Files with the counts of each shard that has tokens."""
    paths = [f"{shards}/counts-{index}.safetensors" for index in range(3)]
    for path, prefix in zip(paths, parts(shards)[:3], strict=True):
        count_token_frequency([prefix], 600).save(path)
    return paths


def test_counts_of_shards_add_up(counts: list[str], shards: Path, tmp_path: Path) -> None:
    merged = merge_token_frequencies(counts)
    assert merged.digest == count_token_frequency(parts(shards)[:3], 600).digest
    whole = count_token_frequency([f"{shards}/whole_text_document"], 600)
    assert merged.occurrences.tolist() == whole.occurrences.tolist()
    # Counts that were added up can be added to more.
    merge_token_frequencies(counts[:2]).save(tmp_path / "two")
    assert merge_token_frequencies([tmp_path / "two", counts[2]]).digest == merged.digest
