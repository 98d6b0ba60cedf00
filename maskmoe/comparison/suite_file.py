"""The sections of a suite file, as pydantic models: which keys exist and which values the keys take.

All values are words as they are written in the file. Sections that hold flags are only passed on from here.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from maskmoe.errors import UserError
from maskmoe.json_files import first_problem
from maskmoe.launch.model_file import read_words

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _parse_count(word: object) -> object:
    if isinstance(word, str):
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"must be a whole number from 1, not {word!r}")
        return int(word)
    return word


def _check_number(word: str) -> str:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{word!r} is not a number of at least 0")
    return word


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _parse_seeds(words: object) -> tuple[int, ...]:
    seeds = [str(word) for word in words] if isinstance(words, list) else [str(words)]
    if not seeds or not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, not {', '.join(seeds) or 'none'}")
    return tuple(map(int, seeds))


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a name consists of letters, digits and . _ + -, because the name names a folder")
    return name


def _check_variants(variants: dict[str, Any]) -> dict[str, Any]:
    if not variants:
        raise ValueError("name at least one variant, for example `variants: {smoe: {mask: {preset: smoe}}}`")
    return variants


Count = Annotated[int, BeforeValidator(_parse_count)]
Number = Annotated[str, AfterValidator(_check_number)]
Words = Annotated[tuple[str, ...], BeforeValidator(_to_list), Field(min_length=1)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_to_list), Field(min_length=1)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(_parse_seeds)]
Name = Annotated[str, AfterValidator(_check_name)]


def _kebab_case(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel):
    """A mapping with known keys. A key without a value is absent."""

    model_config = ConfigDict(frozen=True, alias_generator=_kebab_case)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: object) -> object:
        known = sorted(map(_kebab_case, cls.model_fields))
        if content == "":
            return {}
        if not isinstance(content, dict):
            raise ValueError(f"must hold {', '.join(known)}")
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"unknown {', '.join(unknown)}; the known keys are {', '.join(known)}")
        return content


class VariantSection(_Section):
    """One variant, see `Variant`."""

    title: str | None = None
    model: str | None = None
    flags: Any = {}
    layouts: Any = {}
    mask: Any = None
    seeds: Seeds | None = None
    tuned_as: str | None = None
    equals: str | None = None
    until: Count | None = None


class GridSection(_Section):
    """Further values of P and V_f for one variant."""

    of: str = ""
    frequent_mass: Numbers
    frequent_visible_experts: Numbers
    seeds: Seeds | None = None


class LearningRatesSection(_Section):
    """The learning rates to try."""

    values: Numbers
    iterations: Count
    min_share: Number = "0.1"


class SuiteFile(_Section):
    """A whole suite file, see `Suite`."""

    title: str | None = None
    data: Any = {}
    model: str | None = None
    flags: Any = {}
    expert_flags: Any = {}
    mask: Any = {}
    seeds: Seeds = (1,)
    learning_rates: LearningRatesSection
    variants: Annotated[dict[Name, VariantSection], AfterValidator(_check_variants)] = Field({}, validate_default=True)
    grid: GridSection | None = None
    checkpoints: Count = 8
    keep_checkpoints: Literal["all", "last"] = "all"
    probe_tokens: Count = 16384
    baselines: Words | None = None

    @classmethod
    def read(cls, path: Path) -> "SuiteFile":
        """Read a suite file.

        Raises:
            UserError: the file cannot be read, or a key or value is wrong.
        """
        try:
            return cls.model_validate(read_words(path, "suite"))
        except ValidationError as error:
            raise UserError(f"suite {path}: {first_problem(error)}") from error
