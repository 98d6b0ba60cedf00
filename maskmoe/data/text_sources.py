"""Text sources: which files of which Python packages become documents, as a YAML file describes.

Each package is pinned by the sha256 of its wheel, so the text is the same on every machine. This module only reads the
description; `maskmoe.data.source_corpus` reads the packages.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveInt, ValidationError, model_validator

from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.untrusted import read_words

_MAX_BYTES = 1 << 40
_DOMAIN = re.compile(r"[a-z][a-z0-9-]{0,39}")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,99}")
_WHEEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,199}\.whl")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _matching(pattern: re.Pattern[str], meaning: str) -> AfterValidator:
    def check(word: str) -> str:
        if not pattern.fullmatch(word):
            raise ValueError(f"{word[:100]!r} is not {meaning}")
        return word

    return AfterValidator(check)


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


type _OneOrMore[T] = Annotated[tuple[T, ...], BeforeValidator(_to_list), Field(min_length=1)]
_Bytes = Annotated[PositiveInt, Field(le=_MAX_BYTES)]
_Word = Annotated[str, Field(min_length=1, max_length=200)]
_Domain = Annotated[str, _matching(_DOMAIN, "a name of lower-case letters, digits and -")]


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

    package: Annotated[str, _matching(_PACKAGE, "the name of a package")]
    version: Annotated[str, _matching(_VERSION, "a version")]
    file: Annotated[str, _matching(_WHEEL, "the file name of a wheel, such as words-1.0-py3-none-any.whl")]
    sha256: Annotated[str, _matching(_SHA256, "a sha256 of 64 lower-case hexadecimal digits")]
    license: _Word
    members: _OneOrMore[_Word]
    format: Literal["text", "csv", "sqlite"] = "text"
    table: Annotated[str, Field(max_length=200)] = ""
    columns: Annotated[tuple[_Word, ...], BeforeValidator(_to_list)] = ()
    join_by: Annotated[tuple[_Word, ...], BeforeValidator(_to_list)] = ()
    clean: Annotated[tuple[Literal["html-breaks", "verse-numbers"], ...], BeforeValidator(_to_list)] = ()
    max_bytes: _Bytes | None = None

    @model_validator(mode="after")
    def _check_keys_of_format(self) -> "Source":
        needed = {"text": set[str](), "csv": {"columns"}, "sqlite": {"columns", "table"}}[self.format]
        allowed = needed | ({"join_by", "clean"} if self.format != "text" else set())
        given = {name for name in ("table", "columns", "join_by", "clean") if getattr(self, name)}
        for name in sorted(needed - given):
            raise ValueError(f"format {self.format} needs {name.replace('_', '-')}")
        for name in sorted(given - allowed):
            raise ValueError(f"format {self.format} has no {name.replace('_', '-')}")
        return self


_Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


class TextSources(_Section):
    """The sources of a text for training, and of held-out text.

    Attributes:
        requirements: name of the requirements file for pip, beside the description, that names the same wheels.
        held_out_bytes: size of the documents of each training domain that are kept out of the training text and form a
            held-out set of their own. 0 for no such sets.
        train: sources of the training text by domain.
        held_out: sources of further held-out sets, of other domains than the training text.
    """

    requirements: Annotated[str, _matching(re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"), "the name of a file")]
    held_out_bytes: Annotated[int, Field(ge=0, le=_MAX_BYTES)] = 0
    train: Annotated[Mapping[_Domain, _Sources], Field(min_length=1)]
    held_out: Mapping[_Domain, _Sources] = {}

    @model_validator(mode="after")
    def _check_domains(self) -> "TextSources":
        if common := sorted(self.train.keys() & self.held_out.keys()):
            raise ValueError(f"the domain {common[0]} is both in train and in held-out; give it two names")
        return self

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
    def digest(self) -> str:
        """Sha256 (hex) of the description, without its comments: equal digests give equal texts."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def held_out_sets(self) -> tuple[str, ...]:
        """Names of the held-out sets: the training domains if `held_out_bytes` is set, then the other domains."""
        return (*(self.train if self.held_out_bytes else ()), *self.held_out)

    def sources(self) -> Iterator[Source]:
        """Yield all sources in order."""
        for domain in (*self.train.values(), *self.held_out.values()):
            yield from domain
