"""The text of the installed Python: which files belong to it, and the command that writes it."""

import inspect
import json
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.command_lines import run_command

from maskmoe.data.default_corpus import default_corpus, is_written_by_people


def test_default_corpus() -> None:
    documents = list(default_corpus(6_000_000))
    assert documents == list(default_corpus(6_000_000))
    assert 5_800_000 <= sum(len(document["text"].encode()) for document in documents) <= 6_000_000
    assert len({document["text"] for document in documents}) == len(documents)
    assert all(len(line.encode()) <= 1000 for document in documents for line in document["text"].split("\n"))
    assert max(len(document["text"].encode()) for document in documents) <= 1 << 15


def table_of_digits(num_lines: int) -> str:
    draw = random.Random(0)
    return "".join(" ".join(f"{draw.random():.6f}" for _ in range(8)) + "\n" for _ in range(num_lines))


SOURCE = inspect.getsource(random)
NUMBERS_AND_TABLES = {
    "few numbers": "0.25 17 3\n" * 50,
    "table of floats": table_of_digits(500),
    "table of code points": "".join(f"    0x{code:04X},\n" for code in range(500)),
    "table of words": "TABLE = {\n"
    + "".join(f"    'name_{'x' * (code % 7)}': 'value',\n" for code in range(300))
    + "}\n",
    "source with an embedded table": SOURCE + table_of_digits(1000),
    "one long line": SOURCE + "x" * 1001 + "\n",
}
WRITTEN = {
    "source": SOURCE,
    "documentation": inspect.getdoc(random.Random.choices) or "",
    "source with numbers": SOURCE + table_of_digits(50),
    "short list of names": "__all__ = [\n" + "".join(f"    'name{number}',\n" for number in range(150)) + "]\n",
    "blank lines": "Some words.\n" + "\n" * 1000 + "More words.\n",
    "empty": "",
}


@pytest.mark.parametrize("name", NUMBERS_AND_TABLES | WRITTEN)
def test_prose_and_source_are_told_from_numbers_and_tables(name: str) -> None:
    text = (NUMBERS_AND_TABLES | WRITTEN)[name]
    assert is_written_by_people(text.encode()) == (name in WRITTEN)


def test_default_corpus_leaves_files_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path)))
    source = SOURCE[: 1 << 14]
    (tmp_path / "package" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "package" / "b.md").write_text("Words, one after the other.\n" * 12)
    (tmp_path / "same.py").write_text(source)
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "huge.py").write_text(source * 5)
    (tmp_path / "numbers.txt").write_text(table_of_digits(20))
    (tmp_path / "latin.txt").write_bytes(source.encode() + b"\xe9")
    (tmp_path / "__editable___package_1_0_finder.py").write_text(f"MAPPING = {{'package': '/checkout'}}\n{source}")
    (tmp_path / "binary.so").write_text(source + "1")
    (tmp_path / "package" / "__pycache__" / "c.py").write_text(source + "2")
    assert [document["path"] for document in default_corpus(1 << 20)] == ["a.py", "package/b.md"]
    assert [document["path"] for document in default_corpus(len(source.encode()))] == ["a.py"]


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
