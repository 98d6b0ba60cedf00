"""The text of the installed Python: which files belong to it, and the command that writes it."""

import inspect
import json
import random
from collections.abc import Sequence
from pathlib import Path

from support.command_lines import run_command

from maskmoe.data.default_corpus import default_corpus, is_written_by_people


def test_default_corpus() -> None:
    documents = list(default_corpus(6_000_000))
    assert documents == list(default_corpus(6_000_000))
    assert 5_800_000 <= sum(len(document["text"].encode()) for document in documents) <= 6_000_000
    assert len({document["text"] for document in documents}) == len(documents)
    assert all(len(line.encode()) <= 1000 for document in documents for line in document["text"].split("\n"))
    assert max(len(document["text"].encode()) for document in documents) <= 1 << 15


def test_make_corpus(tmp_path: Path) -> None:
    outputs: Sequence[Path] = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        result = run_command("corpus", "--output", output, "--max-bytes", 300_000, "--seed", seed)
        assert result.code == 0, result.errors
    first, second, other = (output.read_bytes() for output in outputs)
    assert first == second != other
    assert sorted(first.splitlines()) == sorted(other.splitlines())
    expected = {document["path"]: document["text"] for document in default_corpus(300_000)}
    assert {values["path"]: values["text"] for values in map(json.loads, first.splitlines())} == expected


def test_source_is_told_from_tables_of_numbers() -> None:
    source = inspect.getsource(random)
    assert is_written_by_people(source.encode())
    assert not is_written_by_people(b"0.25 17 3\n" * 50)
    assert not is_written_by_people((source + "x" * 1001 + "\n").encode())
