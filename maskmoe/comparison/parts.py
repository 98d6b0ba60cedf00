"""Parts: one small JSON file for each finished run, from which the report of a comparison is made.

Parts are independent of the machine that made the parts. A comparison can therefore be trained in pieces on several
machines, and its report can be made again from the parts alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, Field, NonNegativeInt, model_validator

from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.run_results import Curve, Evaluation, RunResult
from maskmoe.comparison.runs import Run, training_flags
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_record
from maskmoe.files.outputs import atomic_output
from maskmoe.files.paths import check_folder, short_path
from maskmoe.launch.model_file import Flags

# These flags change the speed of a run or the files that it keeps, and none of its results.
_FLAGS_WITHOUT_EFFECT = {"num-workers", "keep-last-checkpoints"}
_DIGITS = 7
_DIGITS_OF_FP32 = 9  # identify every number in fp32
_SHOWN_CHARACTERS = 12  # of a digest in an error

PositiveFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Origin(BaseModel, frozen=True, extra="forbid"):
    """The code and the machine that wrote a part.

    Attributes:
        commit: commit of the checkout; empty if the code does not lie in a checkout.
        is_dirty: whether the code of the package differed from the commit when the part was written.
        packages: versions of Python and of the packages that compute, by name.
        processor: name of the CPU.
        num_cores: number of CPU cores that the process could use.
        num_gpus: number of GPUs.
    """

    commit: str
    is_dirty: bool
    packages: dict[str, str]
    processor: str
    num_cores: NonNegativeInt
    num_gpus: NonNegativeInt

    @property
    def machine(self) -> str:
        """The machine, with the versions of torch and Megatron-Core."""
        machine = f"{self.num_gpus} GPUs" if self.num_gpus else f"{self.num_cores} cores, {self.processor}"
        packages = ", ".join(f"{name} {self.packages.get(name, '?')}" for name in ("torch", "megatron-core"))
        return f"{machine} ({packages})"


class Part(BaseModel, frozen=True, extra="forbid"):
    """A finished run.

    Attributes:
        version: version of the format.
        suite: name of the suite.
        run: name of the run.
        kind: see `Run`.
        variant: name of the variant.
        seed: seed of the run.
        learning_rate: largest learning rate of the run.
        settings: what decides the result, without the text, see `settings_of`.
        text: digests and settings of the text, see `text_digests`.
        mask_digest: digest of the routing mask; None for a model without experts.
        parameters: numbers of parameters; None if the variant's settings are not checked, as in a grid.
        origin: the code and the machine.
        seconds: duration of the training.
        tokens_per_second: mean speed of the training, without the time of starts and of held-out losses.
        training: losses of training, thinned.
        validation: losses of a part of the held-out text during training.
        exact_losses: losses of the first iterations in fp32, without rounding; empty if no limit needs the losses.
        evaluation: evaluation of the trained model; None for a tuning run and for a limit.
    """

    version: Literal[1] = 1
    suite: str
    run: str
    kind: Literal["tuning", "whole"]
    variant: str
    seed: NonNegativeInt
    learning_rate: str
    settings: dict[str, str]
    text: dict[str, str]
    mask_digest: str | None
    parameters: Parameters | None
    origin: Origin
    seconds: PositiveFloat
    tokens_per_second: PositiveFloat
    training: Curve
    validation: Curve
    exact_losses: Curve
    evaluation: Evaluation | None

    @model_validator(mode="before")
    @classmethod
    def _round(cls, content: Any) -> Any:
        """Round all numbers as in a file, so that a part equals the part that is read from its file."""
        if not isinstance(content, dict):
            return content
        content = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in content.items()}
        digits = {"exact_losses": _DIGITS_OF_FP32}
        return {key: _rounded(value, digits.get(key, _DIGITS)) for key, value in content.items()}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a part.

        Raises:
            UserError: the file cannot be read or is no part.
        """
        return read_record(cls, path, "only parts of a comparison belong here")

    def write(self, path: Path) -> None:
        """Write the part into a file, which replaces an older file atomically; its folder is created if missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(path) as temporary:
            temporary.write_text(self.text_of_file, encoding="utf-8")

    @property
    def text_of_file(self) -> str:
        """The content of the part's file: JSON with one line for each attribute."""
        content = self.model_dump()
        lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def result(self) -> RunResult | None:
        """The result that the report states; None for a tuning run and for a limit."""
        if self.evaluation is None:
            return None
        evaluation = {name: getattr(self.evaluation, name) for name in Evaluation.model_fields}
        own = {name: getattr(self, name) for name in RunResult.model_fields.keys() - evaluation.keys()}
        return RunResult(**evaluation, **own)


def _rounded(value: Any, digits: int) -> Any:
    """Round all floating-point numbers in JSON values to a number of significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(each, digits) for key, each in value.items()}
    return [_rounded(each, digits) for each in value] if isinstance(value, list | tuple) else value


class FoundPart(NamedTuple):
    """A part and its file."""

    file: Path
    part: Part


Parts = Mapping[str, FoundPart]
"""Parts by the names of their runs."""

Identity = tuple[str, bool, frozenset[tuple[str, tuple[str | Decimal, ...]]], frozenset[tuple[str, str]]]
"""Kind, whether the run is analyzed, settings and text: runs with equal identities have the same result."""


@dataclass(frozen=True)
class MergedParts:
    """Parts of runs that were finished elsewhere.

    Attributes:
        own: parts of the suite's runs, by name.
        others: parts of the runs of other suites, by identity. A run of the suite with the same identity is finished.
    """

    own: Parts = field(default_factory=dict)
    others: Mapping[Identity, FoundPart] = field(default_factory=dict)


def settings_of(suite: Suite, run: Run) -> dict[str, str]:
    """Return what decides the result of a run, besides the text: flags by name, each as one text.

    The names of flags of the mask start with `mask.`, those of a layout with `layouts.RANKS.`.
    """
    variant = run.variant
    sections: dict[str, Flags] = {"": training_flags(suite, run), "mask.": variant.mask or {}}
    sections |= {f"layouts.{ranks}.": flags for ranks, flags in variant.layouts.items()}
    if run.is_analyzed and variant.has_experts:
        sections["probe-"] = {"tokens": (str(suite.probe_tokens),)}
    return {
        f"{prefix}{flag}": " ".join(words) or "true"
        for prefix, flags in sections.items()
        for flag, words in sorted(flags.items())
        if flag not in _FLAGS_WITHOUT_EFFECT
    }


def identity_of(kind: str, is_analyzed: bool, settings: Mapping[str, str], text: Mapping[str, str]) -> Identity:
    """Return all that decides a run's result. Numbers are compared by value: 1e-2 equals 0.01.

    Args:
        kind: see `Run`.
        is_analyzed: see `Run`.
        settings: see `settings_of`.
        text: see `text_digests`.
    """
    values = {name: tuple(map(_number_or_word, words.split())) for name, words in settings.items()}
    return kind, is_analyzed, frozenset(values.items()), frozenset(text.items())


def has_settings(part: Part, settings: Mapping[str, str]) -> bool:
    """Return whether a part has the given settings; numbers are compared by value."""
    theirs, ours = (identity_of("", False, each, {}) for each in (part.settings, settings))
    return theirs == ours


def _number_or_word(word: str) -> Decimal | str:
    """Return the exact value of a finite number, and any other word unchanged."""
    try:
        number = Decimal(word)
    except InvalidOperation:
        return word
    return number if number.is_finite() else word


def read_parts(folders: Iterable[Path], suite: str) -> MergedParts:
    """Read all parts in some folders and their subfolders.

    Args:
        folders: the folders.
        suite: name of the suite whose parts are wanted by name.

    Raises:
        UserError: a folder does not exist or holds no part, a file is not a part, or two different parts are of one
            run.
    """
    own: dict[str, FoundPart] = {}
    others: dict[Identity, FoundPart] = {}
    for folder in folders:
        check_folder(folder, "--merge")
        files = sorted(folder.rglob("*.json"))
        if not files:
            raise UserError(f"--merge {folder} holds no parts; name a folder such as runs/SUITE/parts")
        for file in files:
            part = Part.read(file)
            if part.suite == suite:
                _add_part(own, FoundPart(file, part))
            else:
                identity = identity_of(part.kind, part.evaluation is not None, part.settings, part.text)
                # The losses of a limit are only in the parts of a suite that has a limit.
                if identity not in others or not others[identity].part.exact_losses.iterations:
                    others[identity] = FoundPart(file, part)
    return MergedParts(own, others)


def _add_part(parts: dict[str, FoundPart], found: FoundPart) -> None:
    """Add a part to others.

    Raises:
        UserError: there is another part of the same run, with different content.
    """
    other = parts.setdefault(found.part.run, found)
    if other.part.text_of_file != found.part.text_of_file:
        raise UserError(
            f"{short_path(other.file)} and {short_path(found.file)} are different parts of the run {found.part.run}; "
            "remove one of the files"
        )


def check_settings(found: FoundPart, suite: Suite, run: Run) -> None:
    """Check that a part is of a run with the settings that the suite has now.

    Args:
        found: the part.
        suite: the suite.
        run: the run that the part is named after.

    Raises:
        UserError: a setting differs; the message names the first.
    """
    part, file = found.part, short_path(found.file)
    named = (part.variant, part.seed, part.kind, part.learning_rate)
    if named != (run.variant.name, run.seed, run.kind, run.learning_rate):
        raise UserError(f"{file} is damaged: it contradicts the name of its run {part.run}; remove the file")
    ours = settings_of(suite, run)
    if change := first_difference(part.settings, ours):
        raise UserError(f"{file} was made with other settings than the suite {suite.name} has now: {change}")
    if run.is_analyzed != (part.evaluation is not None):
        raise UserError(
            f"{file} is damaged: it lacks an evaluation, or has one that its kind of run does not have; remove the file"
        )


def check_same_text(parts: Sequence[FoundPart], ours: Mapping[str, str] | None, our_name: str) -> None:
    """Check that all parts belong to one text.

    Args:
        parts: the parts.
        ours: digests of the text of this machine; None if there is none.
        our_name: what the error calls the text of this machine.

    Raises:
        UserError: two texts differ. The message names the part, and the first difference.
    """
    if ours is None and parts:
        ours, our_name = parts[0].part.text, short_path(parts[0].file)
    for found in parts:
        if change := first_difference(found.part.text, ours or {}):
            raise UserError(f"{short_path(found.file)} belongs to another text than {our_name}: {change}")


def first_difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Describe the first difference of two mappings, `KEY is THEIRS, not OURS`; "" if the mappings are equal."""
    for key in {**ours, **theirs}:
        if theirs.get(key) != ours.get(key):
            values = (_shorten(each[key]) if key in each else "not given" for each in (theirs, ours))
            return "{} is {}, not {}".format(_shorten(key), *values)
    return ""


def _shorten(text: str) -> str:
    """Return the beginning of a digest, or another text on one line."""
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    return f"{text[:_SHOWN_CHARACTERS]}…" if is_digest else " ".join(text.split())[:200]


def count_equal(own: Curve, other: Curve) -> tuple[int, int]:
    """Return how many iterations two curves have in common, and in how many of them the losses are the same."""
    theirs = dict(zip(other.iterations, other.losses, strict=True))
    pairs = [
        (loss, theirs[iteration])
        for iteration, loss in zip(own.iterations, own.losses, strict=True)
        if iteration in theirs
    ]
    return len(pairs), sum(mine == its for mine, its in pairs)
