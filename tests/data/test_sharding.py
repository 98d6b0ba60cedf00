"""Shards divide the files without loss, in order and evenly."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmoe.data.documents import read_blocks
from maskmoe.data.inputs import Input, ReadingOptions, find_inputs
from maskmoe.data.sharding import Shard, take_shard
from maskmoe.errors import UserError

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


def documents(inputs: Sequence[Input]) -> list[str]:
    return [text for block in read_blocks(inputs) for text in block.documents(["text"])[0]]


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
)
def test_shards_hold_all_documents_in_order(tmp_path: Path, files: list[tuple[str, list[str]]], count: int) -> None:
    paths = [write(tmp_path / f"{number}-{name}", texts) for number, (name, texts) in enumerate(files)]
    for path in paths:
        if "hidden" in path.name:
            path.write_bytes(gzip.compress(path.read_bytes()))
    separator = "<sep>" if any(path.suffix == ".txt" for path in paths) else None
    inputs = find_inputs(paths, ReadingOptions(separator=separator))
    parts = [take_shard(inputs, Shard(index, count)) for index in range(count)]
    assert [text for part in parts for text in documents(part)] == documents(inputs)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_files_are_distributed_evenly(tmp_path: Path, name: str) -> None:
    inputs = find_inputs([write(tmp_path / f"{number}-{name}", [f"{number}"] * 20) for number in range(12)])
    for count in (3, 4, 24):
        sizes = [len(documents(take_shard(inputs, Shard(index, count)))) for index in range(count)]
        assert sum(sizes) == 240
        assert max(sizes) <= max(20, 240 // count)


def test_pipes_and_standard_input_cannot_be_divided() -> None:
    for source in (Input("pipe", "jsonl", None), Input("-", "jsonl", 100)):
        with pytest.raises(UserError, match=f"--shard needs files, but input {source.name} is a pipe or standard"):
            take_shard([source], Shard(0, 2))


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", " 0/2", "٠/٢"])
def test_bad_shards(text: str) -> None:
    with pytest.raises(UserError, match="must be I/N with I from 0 to N - 1"):
        Shard.parse(text)
