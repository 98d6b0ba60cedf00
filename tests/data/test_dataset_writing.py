"""Datasets are written, shuffled and joined: the bytes are Megatron's, and those of one machine's dataset."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

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
from maskmoe.data.tokenizer import TokenizerRecord
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


def test_temporary_dataset_lies_beside_the_dataset(
    jsonl: Callable, sentencepiece_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the dataset may be the only one with enough space."""
    opened = Mock(wraps=TemporaryDirectory)
    monkeypatch.setattr("maskmoe.data.preprocess.TemporaryDirectory", opened)
    (tmp_path / "out").mkdir()
    prefix = f"{tmp_path}/out/"  # the dataset is `out/_text_document`
    preprocess([jsonl("a.jsonl", ["a"])], "SentencePieceTokenizer", sentencepiece_model, prefix, shuffle_seed=1)
    assert [call.kwargs["dir"] for call in opened.call_args_list] == [tmp_path / "out"]


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
@pytest.mark.parametrize("named", ["shards", "output prefix"])
def test_merging_gives_the_dataset_of_one_machine(
    shards: Path,
    tmp_path: Path,
    seed: int | None,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(dataset_writing, "_BATCH_TOKENS", 5000)
    names = parts(shards) if named == "shards" else [f"{shards}/part"]
    shuffle = [] if seed is None else ["--shuffle-seed", str(seed)]
    monkeypatch.setattr(sys, "argv", ["x", "--merge", *names, "--output-prefix", f"{tmp_path}/merged", *shuffle])
    preprocess_data.main()
    prefix = f"{tmp_path}/merged" + ("" if named == "shards" else "_text_document")
    assert capsys.readouterr().out.startswith(f"{prefix}: ")
    assert content(prefix) == content(shards / f"{'whole' if seed is None else 'shuffled'}_text_document")
    assert sorted(path.name.removeprefix("merged") for path in tmp_path.iterdir()) == sorted(
        f"{'' if named == 'shards' else '_text_document'}.{suffix}" for suffix in SUFFIXES
    )


def test_documents_of_several_sequences_are_joined(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_sequences(np.array([0, 1, 2, 3, 4, 5, 0, 1, 2]), np.array([1, 2, 3, 3]), np.array([3, 1]))
    names = [str(tmp_path / "a"), str(write_documents(tmp_path / "b", [[1], [2, 3]]))]
    merge_datasets(names, f"{tmp_path}/merged")
    index = read_index(tmp_path / "merged")
    assert index.sequence_lengths.tolist() == [1, 2, 3, 3, 1, 2]
    assert index.document_indices.tolist() == [0, 3, 4, 5, 6]
    with pytest.raises(UserError, match="documents of several sequences, which cannot be shuffled"):
        merge_datasets(names, f"{tmp_path}/shuffled", shuffle_seed=1)


def record(**changes: object) -> TokenizerRecord:
    values = {"type": "HuggingFaceTokenizer", "model": "a", "sha256": "0" * 64, "vocab_size": 10, "eod_id": None}
    return TokenizerRecord(**values | changes)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"dtype": np.int32, "tokenizer": record()}, "a has uint16 ids, .*b has int32 ids"),
        ({"tokenizer": record(sha256="1" * 64)}, "differ in their tokenizers"),
        ({"tokenizer": record(eod_id=1)}, "differ in their tokenizers"),
        ({"tokenizer": None}, "b with an unknown one"),
    ],
)
def test_datasets_that_differ_are_not_joined(tmp_path: Path, second: dict, message: str) -> None:
    names = [str(write_documents(tmp_path / "a", [[1]], tokenizer=record()))]
    names.append(str(write_documents(tmp_path / "b", [[2]], **second)))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        merge_datasets(names, f"{tmp_path}/merged")
    assert sorted(tmp_path.iterdir()) == before
    # The name of the tokenizer's file does not matter.
    names[1] = str(write_documents(tmp_path / "c", [[2]], tokenizer=record(model="other")))
    merge_datasets(names, f"{tmp_path}/merged")


@pytest.mark.parametrize("problem", ["differ", "hold no tokens"])
def test_a_refused_merging_keeps_the_records_of_earlier_datasets(tmp_path: Path, problem: str) -> None:
    for shard in ("a-00000-of-00002", "a-00001-of-00002"):
        for key in ("x", "y"):
            write_documents(tmp_path / f"{shard}_{key}_document", [[1]])
    arguments = ([f"{tmp_path}/a"], f"{tmp_path}/merged", ["x", "y"])
    merge_datasets(*arguments)
    write_documents(tmp_path / "a-00000-of-00002_y_document", [])
    write_documents(tmp_path / "a-00001-of-00002_y_document", [], dtype=np.int32 if problem == "differ" else np.uint16)
    before = {path: path.read_bytes() for path in tmp_path.glob("merged*")}
    assert len(before) == 4
    with pytest.raises(UserError, match=problem):
        merge_datasets(*arguments, force=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("merged*")} == before


def test_an_input_of_merging_is_not_replaced(tmp_path: Path) -> None:
    names = [str(write_documents(tmp_path / name, [[1]])) for name in "ab"]
    with pytest.raises(UserError, match="is an input"):
        merge_datasets(names, names[0], force=True)
    with pytest.raises(UserError, match="is given twice"):
        merge_datasets([names[0], f"{tmp_path}/../{tmp_path.name}/a"], f"{tmp_path}/merged")
    merge_datasets(names, f"{tmp_path}/merged")
    with pytest.raises(UserError, match=r"it exists; .*--force"):
        merge_datasets(names, f"{tmp_path}/merged")


@pytest.mark.parametrize("keys", [("raw_text", "text"), ("text", "raw_text")])
def test_shards_of_a_key_that_ends_in_another_key(tmp_path: Path, keys: tuple[str, str]) -> None:
    """The prefix may be written in another way than the paths of the shards."""
    (tmp_path / "data").mkdir()
    for number in range(2):
        for token, key in enumerate(keys):
            write_documents(tmp_path / "data" / f"a-0000{number}-of-00002_{key}_document", [[token]])
    for token, key in enumerate(keys):
        merge_datasets([f"{tmp_path}//data/./a"], f"{tmp_path}/{key}", [key])
        assert documents_of(tmp_path / f"{key}_{key}_document") == [[token], [token]]


def test_missing_and_unusable_datasets(shards: Path, tmp_path: Path) -> None:
    def link(name: str, index: int, count: int) -> None:
        for suffix in SUFFIXES:
            target = Path(f"{parts(shards)[index]}.{suffix}")
            (tmp_path / f"{name}-0000{index}-of-0000{count}_text_document.{suffix}").symlink_to(target)

    link("lost", 0, 4)
    link("lost", 2, 4)
    link("two", 0, 4)
    link("two", 0, 2)
    empty = str(write_documents(tmp_path / "empty", []))
    cut = write_documents(tmp_path / "cut", [[1, 2]])
    Path(f"{cut}.bin").write_bytes(b"1")
    for names, message in (
        (["nothing"], "there is no dataset nothing, and no shard nothing-00000-of-N_text_document; .* without .idx"),
        ([parts(shards)[0], "nothing"], "dataset nothing: nothing.idx does not exist"),
        ([f"{tmp_path}/lost"], "lost lacks 2 of 4 shards, the first is 1/4: make it with --shard"),
        ([f"{tmp_path}/two"], "has shards of 2 and 4; name the shards"),
        ([empty], "hold no tokens"),
        ([empty, str(cut)], "truncated"),
    ):
        with pytest.raises(UserError, match=message):
            merge_datasets(names, f"{tmp_path}/merged")
        assert list(tmp_path.glob("*merged*")) == []


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


def test_counts_that_cannot_be_added_up(counts: list[str], shards: Path, tmp_path: Path) -> None:
    count_token_frequency(["0.5", parts(shards)[0], "2", parts(shards)[1]], 600).save(tmp_path / "weights")
    count_token_frequency([str(write_documents(tmp_path / "other", [[1]]))], 601).save(tmp_path / "ids")
    foreign = write_documents(tmp_path / "foreign", [[1]], tokenizer=record(vocab_size=600))
    count_token_frequency([str(foreign)], 600).save(tmp_path / "tokenizer")
    merge_token_frequencies(counts[:2]).save(tmp_path / "two")
    for names, message in (
        ([counts[0], counts[0]], "names a file of counts twice"),
        ([counts[0], tmp_path / "two"], r"part-00000-of-00004_text_document is counted in .*counts-0.* and in .*two"),
        ([counts[2], tmp_path / "weights"], "has blend weights, which hold among its own datasets only"),
        ([counts[0], tmp_path / "ids"], "has 600 ids, .* has 601 ids"),
        ([counts[0], tmp_path / "tokenizer"], "made with different tokenizers"),
    ):
        with pytest.raises(UserError, match=message):
            merge_token_frequencies(names)
