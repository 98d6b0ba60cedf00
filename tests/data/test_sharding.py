"""Shards divide the documents without loss, in order and evenly; merging gives the bytes of one machine's dataset."""

import gzip
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.datasets import write_documents

from maskmoe.command_line import count_token_frequency as count_command
from maskmoe.command_line import preprocess_data
from maskmoe.data import corpus, indexed_dataset
from maskmoe.data.corpus import parse_block, read_blocks
from maskmoe.data.indexed_dataset import IndexedDatasetWriter, open_tokens, read_index
from maskmoe.data.inputs import Input, ReadingOptions, find_inputs
from maskmoe.data.merging import merge_datasets
from maskmoe.data.preprocess import preprocess
from maskmoe.data.sharding import Shard, take_shard
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency, merge_token_frequencies

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SUFFIXES = ("bin", "idx", "tokenizer.json")


def documents(inputs: Sequence[Input]) -> list[str]:
    return [text for block in read_blocks(inputs) for text in parse_block(block, ["text"])[0]]


def write(path: Path, texts: Sequence[str]) -> Path:
    """Write documents in the format that the path's suffix tells."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix in (".arrow", ".ipc"):
        with (pa.ipc.new_file if path.suffix == ".ipc" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    elif path.suffix == ".txt":
        path.write_text("<sep>".join(texts), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


NAMES = ("a.jsonl", "a.parquet", "a.arrow", "a.ipc", "a.txt", "a.jsonl.gz", "hidden-gzip.jsonl")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(st.sampled_from(NAMES), st.lists(TEXT, max_size=12)), min_size=1, max_size=4),
    count=st.integers(1, 9),
    chunk_bytes=st.integers(1, 50),
)
def test_shards_hold_all_documents_in_order(
    tmp_path: Path, files: list[tuple[str, list[str]]], count: int, chunk_bytes: int
) -> None:
    paths = [write(tmp_path / f"{number}-{name}", texts) for number, (name, texts) in enumerate(files)]
    for path in paths:
        if "hidden" in path.name:
            path.write_bytes(gzip.compress(path.read_bytes()))
    separator = "<sep>" if any(path.suffix == ".txt" for path in paths) else None
    inputs = find_inputs(paths, ReadingOptions(separator=separator))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_CHUNK_BYTES", chunk_bytes)
        parts = [take_shard(inputs, Shard(index, count)) for index in range(count)]
        assert [text for part in parts for text in documents(part)] == documents(inputs)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.ipc", "a.txt"])
def test_one_large_file_is_divided_evenly(tmp_path: Path, name: str) -> None:
    texts = [f"text {number:03} " * 20 for number in range(600)]
    inputs = find_inputs(
        [write(tmp_path / name, texts)], ReadingOptions(separator="<sep>" if name == "a.txt" else None)
    )
    for count in (2, 7):
        parts = [take_shard(inputs, Shard(index, count)) for index in range(count)]
        sizes = [len(documents(part)) for part in parts]
        assert sum(sizes) == 600
        assert max(sizes) - min(sizes) <= 600 / count * 0.1 + 3
        assert sum(part[0].num_bytes for part in parts) == pytest.approx(inputs[0].num_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.arrow"])
def test_files_that_cannot_be_divided_are_distributed(tmp_path: Path, name: str) -> None:
    inputs = find_inputs([write(tmp_path / f"{number}-{name}", [f"{number}"] * 20) for number in range(12)])
    for count in (3, 4, 24):
        sizes = [len(documents(take_shard(inputs, Shard(index, count)))) for index in range(count)]
        assert sum(sizes) == 240
        assert max(sizes) <= max(20, 240 // count)


def test_a_separator_that_overlaps_itself_does_not_divide_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n\n\n" * 1000)
    inputs = find_inputs([tmp_path / "a.txt"], ReadingOptions(separator="\n\n"))
    parts = [documents(take_shard(inputs, Shard(index, 3))) for index in range(3)]
    assert [part for part in parts if part] == [documents(inputs)]


def test_lines_of_a_part_are_located(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}\n'] * 100
    lines[70] = b"bad\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    part = take_shard(find_inputs([tmp_path / "a.jsonl"]), Shard(1, 2))
    with pytest.raises(UserError, match=r"a\.jsonl: line 21 after byte 700: invalid JSON"):
        documents(part)


def test_pipes_and_standard_input_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--shard needs files, but input pipe is a pipe"):
        take_shard([Input("pipe", "jsonl", None)], Shard(0, 2))
    path = write(tmp_path / "a.jsonl", ["a"] * 100)
    with pytest.raises(UserError, match="--shard needs files, but an input is standard input: name the file"):
        take_shard([Input("-", "jsonl", path.stat().st_size)], Shard(0, 2))


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", " 0/2", "٠/٢"])
def test_bad_shards(text: str) -> None:
    with pytest.raises(UserError, match="must be I/N with I from 0 to N - 1"):
        Shard.parse(text)


# ---- The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, texts: list[str], sentencepiece_model: Path) -> Path:
    """A folder with a dataset `whole`, the same dataset shuffled, and its shards `part-I-of-4`, the last one empty."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [write(folder / "0.parquet", texts), write(folder / "1.jsonl", [*texts, *texts[-6:] * 9])]
    # A document that fills the last shards.
    paths.append(write(folder / "2.jsonl", ["word " * 100_000]))
    arguments = (paths, "SentencePieceTokenizer", sentencepiece_model)
    preprocess(*arguments, folder / "whole", append_eod=True)
    preprocess(*arguments, folder / "shuffled", append_eod=True, shuffle_seed=7)
    for index in range(4):
        (writer,) = preprocess(*arguments, folder / "part", append_eod=True, shard=Shard(index, 4))
        assert (writer.num_documents == 0) == (index == 3)
    return folder


def parts(folder: Path) -> list[str]:
    return [f"{folder}/part-0000{index}-of-00004_text_document" for index in range(4)]


def assert_same(prefix: Path | str, expected: Path | str) -> None:
    for suffix in SUFFIXES:
        assert Path(f"{prefix}.{suffix}").read_bytes() == Path(f"{expected}.{suffix}").read_bytes()


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
    monkeypatch.setattr(indexed_dataset, "_BATCH_TOKENS", 5000)
    names = parts(shards) if named == "shards" else [f"{shards}/part"]
    shuffle = [] if seed is None else ["--shuffle-seed", str(seed)]
    monkeypatch.setattr(sys, "argv", ["x", "--merge", *names, "--output-prefix", f"{tmp_path}/merged", *shuffle])
    preprocess_data.main()
    prefix = f"{tmp_path}/merged" + ("" if named == "shards" else "_text_document")
    assert capsys.readouterr().out.startswith(f"{prefix}: ")
    assert_same(prefix, shards / f"{'whole' if seed is None else 'shuffled'}_text_document")
    assert sorted(path.name.removeprefix("merged") for path in tmp_path.iterdir()) == sorted(
        f"{'' if named == 'shards' else '_text_document'}.{suffix}" for suffix in (*SUFFIXES, "parts.json")
    )


def test_a_dataset_beside_its_shards_is_not_taken_for_them(shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("part-*"):
        (tmp_path / path.name).symlink_to(path)
    merge_datasets([f"{tmp_path}/part"], f"{tmp_path}/part")
    first = Path(f"{tmp_path}/part_text_document.bin").read_bytes()
    with pytest.raises(UserError, match=r"part stands for the dataset .*part_text_document and for its 4 shards: name"):
        merge_datasets([f"{tmp_path}/part"], f"{tmp_path}/other")
    # The result of an earlier joining is replaced.
    Path(f"{tmp_path}/part_text_document.bin").write_bytes(first[:10])
    merge_datasets([f"{tmp_path}/part"], f"{tmp_path}/part", force=True)
    assert Path(f"{tmp_path}/part_text_document.bin").read_bytes() == first


def test_datasets_are_joined_in_the_given_order(tmp_path: Path) -> None:
    first, second = [[1, 2], [], [3]], [[4], [5, 6, 7]]
    names = [str(write_documents(tmp_path / name, ids)) for name, ids in (("a", first), ("b", second))]
    merge_datasets(names[::-1], f"{tmp_path}/merged")
    index, tokens = read_index(tmp_path / "merged"), open_tokens(tmp_path / "merged")
    found = [tokens[start:end].tolist() for start, end in pairwise(index.document_boundaries)]
    assert found == second + first


def test_documents_of_several_sequences_are_joined(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.arange(6), [1, 2, 3])
        writer.add_document(np.arange(3), [3])
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
    for name in ("a", "b"):
        for key in ("x", "y"):
            write_documents(tmp_path / f"{name}_{key}_document", [[1]])
    arguments = ([f"{tmp_path}/a", f"{tmp_path}/b"], f"{tmp_path}/merged", ["x", "y"])
    merge_datasets(*arguments)
    write_documents(tmp_path / "a_y_document", [])
    write_documents(tmp_path / "b_y_document", [], dtype=np.int32 if problem == "differ" else np.uint16)
    before = {path: path.read_bytes() for path in tmp_path.glob("merged*")}
    assert len(before) == 6
    with pytest.raises(UserError, match=problem):
        merge_datasets(*arguments, force=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("merged*")} == before


def test_keys_are_refused_with_prefixes_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(write_documents(tmp_path / f"{name}_text_document", [[1]])) for name in "ab"]
    for keys in ("nokey", "text"):
        flags = ["--merge", *names, "--json-keys", keys, "--output-prefix", f"{tmp_path}/merged"]
        monkeypatch.setattr(sys, "argv", ["x", *flags])
        with pytest.raises(UserError, match=r"--json-keys is for output prefixes, but .*a_text_document is a d"):
            preprocess_data.main()
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("force", [False, True])
def test_an_input_of_merging_is_not_replaced(tmp_path: Path, force: bool) -> None:
    names = [str(write_documents(tmp_path / name, [[1]])) for name in "ab"]
    with pytest.raises(UserError, match="is an input"):
        merge_datasets(names, names[0], force=force)
    with pytest.raises(UserError, match="is given twice"):
        merge_datasets([names[0], f"{tmp_path}/../{tmp_path.name}/a"], f"{tmp_path}/merged")
    merge_datasets(names, f"{tmp_path}/merged")
    if force:
        merge_datasets(names, f"{tmp_path}/merged", force=True)
    else:
        with pytest.raises(UserError, match=r"it exists; .*--force"):
            merge_datasets(names, f"{tmp_path}/merged")


def test_missing_and_unusable_datasets(shards: Path, tmp_path: Path) -> None:
    def link(name: str, index: int, count: int) -> None:
        for suffix in (*SUFFIXES, "shard.json"):
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
        (["nothing"], "there is no dataset nothing, and none nothing_text_document, and no shards of it$"),
        ([f"{parts(shards)[0]}.idx"], "give prefixes without .idx and .bin"),
        ([parts(shards)[0], "nothing"], "dataset nothing: nothing.idx does not exist"),
        ([f"{tmp_path}/lost"], "lost lacks 2 of 4 shards, the first is 1/4: make it with --shard"),
        ([f"{tmp_path}/two"], "has shards of 2 and 4; name the shards"),
        ([empty], "hold no tokens"),
        ([empty, str(cut)], "truncated"),
    ):
        with pytest.raises(UserError, match=message):
            merge_datasets(names, f"{tmp_path}/merged")
        assert list(tmp_path.glob("*merged*")) == []


def test_shards_of_different_texts_are_not_joined(tmp_path: Path, jsonl: Callable, sentencepiece_model: Path) -> None:
    path = jsonl("a.jsonl", ["one text", "another text", "third"])
    arguments = ("SentencePieceTokenizer", sentencepiece_model, tmp_path / "part")
    for index in (0, 1):
        preprocess([path], *arguments, shard=Shard(index, 2))
    merge_datasets([f"{tmp_path}/part"], f"{tmp_path}/merged")
    for inputs, flags in (([path, path], {}), ([path], {"append_eod": True})):
        preprocess(inputs, *arguments, shard=Shard(1, 2), force=True, **flags)
        with pytest.raises(UserError, match="were made of different input files, or with different settings"):
            merge_datasets([f"{tmp_path}/part"], f"{tmp_path}/merged", force=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "a", "--output-prefix", "b"], "required: --tokenizer-type"),
        (["--output-prefix", "b"], "one of the arguments --input --merge is required"),
        (["--input", "a", "--merge", "a", "--output-prefix", "b"], "not allowed with"),
        (["--merge", "a", "--output-prefix", "b", "--append-eod"], "--append-eod is for --input"),
        (["--merge", "a", "--output-prefix", "b", "--shard", "0/2"], "--shard is for --input"),
        (["--merge", "a", "--output-prefix", "b", "--shuffle-seed", "-1"], "--shuffle-seed must be at least 0, not -1"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    with pytest.raises(UserError, match=rf"{message}.* \(see x --help\)$"):
        preprocess_data.main()


def test_shards_are_shuffled_by_merging(jsonl: Callable, sentencepiece_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give it to --merge instead"):
        preprocess(
            [jsonl("a.jsonl", ["a"])],
            "SentencePieceTokenizer",
            sentencepiece_model,
            tmp_path / "a",
            shuffle_seed=1,
            shard=Shard(0, 2),
        )


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


@pytest.mark.parametrize("seed", [None, 7])
def test_counts_of_shards_are_those_of_the_joined_dataset(
    counts: list[str], shards: Path, tmp_path: Path, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_datasets([f"{shards}/part"], f"{tmp_path}/merged", shuffle_seed=seed)
    flags = ["--merge", *counts[::-1], "--data-path", f"{tmp_path}/merged_text_document", "--output", f"{tmp_path}/c"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    count_command.main()
    expected = count_token_frequency([f"{tmp_path}/merged_text_document"], 600)
    assert TokenFrequency.load(tmp_path / "c").digest == expected.digest


def test_counts_of_other_parts_are_refused(counts: list[str], shards: Path, tmp_path: Path) -> None:
    merge_datasets([f"{shards}/part"], f"{tmp_path}/merged")
    joined = f"{tmp_path}/merged_text_document"
    with pytest.raises(UserError, match="joined from 3 datasets with tokens, and the counts are not those"):
        merge_token_frequencies(counts[:2], joined)
    with pytest.raises(UserError, match="was not joined by"):
        merge_token_frequencies(counts, f"{shards}/whole_text_document")
    preprocess_again = write_documents(Path(joined), [[1, 2, 3]])
    with pytest.raises(UserError, match="describes an earlier dataset"):
        merge_token_frequencies(counts, str(preprocess_again))


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
        ([counts[0], tmp_path / "missing"], "token frequency file .*/missing does not exist"),
        ([counts[0], f"{parts(shards)[0]}.idx"], "is not a readable safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            merge_token_frequencies(names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --data-path and --vocab-size, or --merge"),
        (["--data-path", "a"], "give --data-path and --vocab-size, or --merge"),
        (["--merge", "a", "--vocab-size", "5"], "do not apply to --merge"),
        (["--merge", "a", "--data-path", "a", "b"], "takes the prefix of one joined dataset"),
    ],
)
def test_flags_of_counting_that_do_not_fit(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--output", "c"])
    with pytest.raises(UserError, match=rf"{message}.* \(see x --help\)$"):
        count_command.main()
