"""Suites: which variants of a model are compared and how the variants are trained, as a YAML file describes both.

The pydantic models say which keys a file may have and which values the keys take. Values are words as they are written
in the file. `Suite.read` then merges the flags of the sections, so that each variant has all its flags.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.untrusted import read_words
from maskmoe.launch.model_file import Flags, ModelFile, override, parse_flags, parse_layouts

Role = Literal["main", "grid", "curve", "limit"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_TEXT_FLAGS = {"input", "max-bytes", "sources", "packages", "vocab-size"}
_DATA_FLAGS = {*_TEXT_FLAGS, "data-path", "split", "tokenizer-type", "tokenizer-model"}
_DECIDED_FLAGS = {"seed", "save", "load", "routing-mask", "data-path"}
# A preset decides all other flags of the mask.
_FLAGS_BESIDE_PRESET = {"seed", "shared-table", "expert-model-parallel-size"}
_MERGED_KEYS = {"flags", "expert-flags", "mask"}
_INHERITED_KEYS = _MERGED_KEYS | {
    *("data", "model", "seeds", "learning-rates", "checkpoints", "keep-checkpoints", "probe-tokens"),
}
# A file and a key name the suite and its variants. The role of a variant follows from its keys.
_FIELDS_WITHOUT_KEY = {"name", "role", "base", "curve", "point", "rate_factor"}


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_number(word: str) -> str:
    with suppress(ValueError):
        if 0 <= float(word) < math.inf:
            return word
    raise ValueError(f"{word!r} is not a number of at least 0")


def _check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, not {', '.join(map(str, seeds))}")
    return seeds


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a name consists of letters, digits and . _ + -, because the name names a folder")
    return name


def _check_data(flags: Flags) -> Flags:
    if unknown := sorted(flags.keys() - _DATA_FLAGS):
        raise ValueError(f"unknown {', '.join(unknown)}; the known keys are {', '.join(sorted(_DATA_FLAGS))}")
    return flags


def _parse[T](parse: Callable[[object, str, Mapping[str, str]], T], content: object, info: ValidationInfo) -> T:
    """Parse a section of flags or layouts. The context of the validation holds the variables for `${NAME}`.

    The value `false` is kept as a word, because it removes a flag of an earlier section.
    """
    if isinstance(content, dict):
        content = {name: ["false"] if value == "false" else value for name, value in content.items()}
    try:
        return parse(content, "the section", info.context or {})
    except UserError as error:
        raise ValueError(str(error)) from error


type OneOrMore[T] = Annotated[tuple[T, ...], BeforeValidator(_to_list), Field(min_length=1)]
Number = Annotated[str, AfterValidator(_check_number)]
Seeds = Annotated[OneOrMore[NonNegativeInt], AfterValidator(_check_seeds)]
Name = Annotated[str, AfterValidator(_check_name)]
FlagSection = Annotated[Flags, PlainValidator(partial(_parse, parse_flags))]
LayoutSection = Annotated[Mapping[int, Flags], PlainValidator(partial(_parse, parse_layouts))]


def _kebab_case(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel, frozen=True, alias_generator=_kebab_case):
    """A mapping with known keys. A section without content has no keys."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: object) -> object:
        known = sorted(map(_kebab_case, cls.model_fields.keys() - _FIELDS_WITHOUT_KEY))
        if content == "":
            return {}
        if not isinstance(content, dict):
            raise ValueError(f"must hold {', '.join(known)}")
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"unknown {', '.join(unknown)}; the known keys are {', '.join(known)}")
        return content


class Variant(_Section):
    """A model to be trained.

    Attributes:
        name: name in file names.
        title: name in the report.
        role: `main`: a variant that is compared. `grid`: another P or V_f of a main variant. `curve`: a main variant in
            another setting. `limit`: a variant that must reproduce another variant's losses.
        model: model file with the first flags and the layouts, instead of the suite's model file.
        mask: flags of `maskmoe mask`; None for a model without experts.
        flags: flags of training, without the flags in which the runs of a variant differ.
        layouts: further flags by number of ranks, see `ModelFile`.
        vocab_size: size of the vocabulary, instead of the vocabulary of the suite's data.
        tuned_as: name of the variant whose learning rate is used; the own name if the variant is tuned itself.
        rate_factor: factor of that learning rate.
        equals: for a limit, name of the variant whose losses must be reproduced to the last bit; else None.
        until: iteration at which training stops early; None to train to the end.
        seeds: seeds of the variant's runs.
    """

    name: str = ""
    title: str = ""
    role: Role = "main"
    model: str = ""
    mask: FlagSection | None = None
    flags: FlagSection = {}
    layouts: LayoutSection = {}
    vocab_size: str = ""
    tuned_as: str = ""
    rate_factor: float = 1
    equals: str | None = None
    until: PositiveInt | None = None
    seeds: Seeds = ()

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts."""
        return self.mask is not None

    @property
    def is_tuned(self) -> bool:
        """Whether the variant's own learning rate is searched."""
        return self.tuned_as == self.name

    def learning_rate(self, tuned: str) -> str:
        """Return the largest learning rate of the variant's runs, from the rate of the variant `tuned_as`."""
        return tuned if self.rate_factor == 1 else f"{float(tuned) * self.rate_factor:.6g}"

    def number(self, flag: str) -> float | None:
        """Return the value of a flag of the mask; None if the mask does not have the flag."""
        return float(self.mask[flag][0]) if self.mask and flag in self.mask else None


class Grid(_Section):
    """Further values of P and V_f for the variant `of`."""

    of: str = ""
    frequent_mass: OneOrMore[Number]
    frequent_visible_experts: OneOrMore[Number]
    seeds: Seeds = ()


class Point(_Section):
    """A setting in which main variants are trained again.

    Attributes:
        flags: flags of training that replace those of the variants.
        mask: flags of `maskmoe mask` that replace those of the masks that no preset makes.
        vocab_size: size of the vocabulary, instead of the vocabulary of the suite's data.
        learning_rate_factor: factor of the variants' learning rates. Shorter training favours larger rates.
        seeds: seeds of the point; by default those of the curve.
    """

    flags: FlagSection = {}
    mask: FlagSection = {}
    vocab_size: Annotated[str, AfterValidator(_check_number)] = ""
    learning_rate_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    seeds: Seeds = ()


class Curve(_Section):
    """Further settings that differ in one quantity, such as the number of experts or the length of the training.

    Attributes:
        title: the quantity, as the report names it.
        main_value: value of the quantity in the main setting; empty if the main setting differs in more.
        of: names of the main variants that are trained in each setting.
        seeds: seeds of the points that name none; by default those of the suite.
        points: settings by their value of the quantity.
    """

    title: str
    main_value: Number | Literal[""] = ""
    of: OneOrMore[str]
    seeds: Seeds = ()
    points: Annotated[dict[Number, Point], Field(min_length=1)]


class LearningRates(_Section):
    """The learning rates.

    Attributes:
        values: learning rates that may be tried for every tuned variant, as words, ascending; see `next_rates`.
        iterations: iterations of the runs that try learning rates.
        min_share: smallest learning rate of a run, as a share of the largest.
    """

    values: Annotated[OneOrMore[Number], AfterValidator(lambda words: tuple(sorted(words, key=float)))]
    iterations: PositiveInt
    min_share: Number = "0.1"


class Suite(_Section):
    """The variants that are compared, and how the variants are trained.

    Attributes:
        name: name of the file, without its suffix.
        title: title of the report.
        data: flags that describe the text, see `open_data`. The path of `sources` is relative to the folder of the
            suite in the file, and absolute here.
        model: model file of all variants; the path is relative to the folder of the suite.
        flags: flags of all variants.
        expert_flags: flags of all variants with experts.
        mask: flags of all masks that no preset makes.
        seeds: seeds of the variants that name none.
        learning_rates: learning rates that may be tried.
        variants: variants by name, in the order of the report.
        grid: further values of P and V_f.
        curves: further settings by the name of their curve.
        checkpoints: number of evenly spaced checkpoints of a run.
        keep_checkpoints: whether all checkpoints are kept after their routing was analyzed, or only the last.
        probe_tokens: tokens of held-out text whose routing is analyzed.
        baselines: names of the variants to which the others are compared, seed by seed.
        method: name of the variant about which the report asks whether it is better than the baselines; by default the
            last main variant with experts that is no baseline.
    """

    name: str = ""
    title: str = ""
    data: Annotated[FlagSection, AfterValidator(_check_data)] = {}
    model: str = ""
    flags: FlagSection = {}
    expert_flags: FlagSection = {}
    mask: FlagSection = {}
    seeds: Seeds = (1,)
    learning_rates: LearningRates
    variants: dict[Name, Variant] = {}
    grid: Grid | None = None
    curves: dict[Name, Curve] = {}
    checkpoints: PositiveInt = 8
    keep_checkpoints: Literal["all", "last"] = "all"
    probe_tokens: PositiveInt = 16384
    baselines: OneOrMore[str] = ()
    method: str = ""

    @classmethod
    def read(cls, path: Path, variables: Mapping[str, str]) -> "Suite":
        """Read a suite file.

        Args:
            path: the file.
            variables: values for `${NAME}` in the file.

        Raises:
            UserError: the file cannot be read or does not describe a suite.
        """
        try:
            suite = cls.model_validate(_read_with_base(path), context=variables)
            return suite._complete(path, variables)
        except ValueError as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise UserError(f"suite {path}: {problem}") from error

    @property
    def seq_length(self) -> int:
        """Tokens in a sample."""
        return int(next(iter(self.variants.values())).flags["seq-length"][0])

    def of_role(self, role: Role) -> tuple[Variant, ...]:
        """Return the variants of one role, in order."""
        return tuple(variant for variant in self.variants.values() if variant.role == role)

    def _complete(self, path: Path, variables: Mapping[str, str]) -> "Suite":
        """Return the suite with complete variants. Raises ValueError if the variants do not fit together."""
        if not self.variants:
            raise ValueError("name at least one variant, for example `variants: {smoe: {mask: {preset: smoe}}}`")
        variants = {}
        for name, section in self.variants.items():
            model = section.model or self.model
            model_file = ModelFile.read(path.parent / model, variables) if model else ModelFile(path, {}, {})
            variants[name] = self._complete_variant(name, section, model_file)
        main = dict(variants)
        variants |= {variant.name: variant for variant in self._grid_variants(main)}
        variants |= {variant.name: variant for variant in self._curve_variants(main)}
        baselines = self.baselines or (next(iter(variants)),)
        _check_references(variants, baselines)
        main = [variant for variant in variants.values() if variant.role == "main"]
        others = [variant.name for variant in main if variant.has_experts and variant.name not in baselines]
        method = self.method or (others or [main[-1].name])[-1]
        if method not in {variant.name for variant in main}:
            raise ValueError(f"method: {method} is not a variant of the suite")
        names = {"name": path.stem, "title": self.title or path.stem, "method": method}
        data = {**self.data}
        if "sources" in data:
            data["sources"] = tuple(str((path.parent / word).absolute()) for word in data["sources"])
        return self.model_copy(update={**names, "data": data, "variants": variants, "baselines": baselines})

    def _complete_variant(self, name: str, section: Variant, model_file: ModelFile) -> Variant:
        """Merge the flags of the model file, the suite and the variant; later flags replace earlier ones."""
        flags = model_file.flags
        for further in (self.flags, self.expert_flags if section.has_experts else {}, section.flags):
            flags = override(flags, further)
        # Without the size of a batch, Megatron derives it from the number of ranks.
        needed = ("train-iters", "seq-length", "global-batch-size", "num-layers")
        needed += ("num-experts",) if section.has_experts else ()
        if missing := [flag for flag in needed if flag not in flags]:
            raise ValueError(f"variant {name} has no {missing[0]} among its flags")
        if decided := sorted(_DECIDED_FLAGS & flags.keys()):
            raise ValueError(f"variant {name}: {', '.join(decided)} is decided by the comparison; leave the flag out")
        mask = section.mask
        if mask is not None:
            is_common = _FLAGS_BESIDE_PRESET if "preset" in mask else self.mask
            mask = override({flag: words for flag, words in self.mask.items() if flag in is_common}, mask)
        update = {
            "name": name,
            "title": section.title or name,
            "role": "main" if section.equals is None else "limit",
            "mask": mask,
            "flags": flags,
            "layouts": {**model_file.layouts, **section.layouts},
            "tuned_as": section.tuned_as or section.equals or name,
            "seeds": section.seeds or self.seeds,
        }
        return section.model_copy(update=update)

    def _grid_variants(self, variants: Mapping[str, Variant]) -> Iterator[Variant]:
        """Yield a variant for each further pair of P and V_f."""
        if self.grid is None:
            return
        base = variants.get(self.grid.of)
        if base is None or base.mask is None:
            raise ValueError(f"grid: `of: {self.grid.of}` must name a variant that has a mask")
        own = base.number("frequent-mass"), base.number("frequent-visible-experts")
        common = {"role": "grid", "equals": None, "until": None, "seeds": self.grid.seeds or self.seeds}
        for mass, number in itertools.product(self.grid.frequent_mass, self.grid.frequent_visible_experts):
            if (float(mass), float(number)) != own:
                mask = {**base.mask, "frequent-mass": (mass,), "frequent-visible-experts": (number,)}
                name, title = f"{base.name}.p{mass}-v{number}", f"{base.title}, P = {mass}, V_f = {number}"
                yield base.model_copy(update={**common, "name": name, "title": title, "mask": mask})

    def _curve_variants(self, variants: Mapping[str, Variant]) -> Iterator[Variant]:
        """Yield the variants of each curve in each of its settings."""
        for name, curve in self.curves.items():
            for (value, point), base_name in itertools.product(curve.points.items(), curve.of):
                base = variants.get(base_name)
                if base is None or base.role != "main":
                    raise ValueError(f"curves.{name}: `of: {base_name}` must name a variant that is compared")
                mask = base.mask
                if mask is not None and "preset" not in mask:
                    mask = override(mask, point.mask)
                update = {
                    "name": variant_at_point(name, value, base.name),
                    "title": f"{base.title}, {curve.title} {value}",
                    "role": "curve",
                    "mask": mask,
                    "flags": override(base.flags, _without_flags_of_experts(point.flags, base)),
                    "vocab_size": point.vocab_size,
                    "rate_factor": point.learning_rate_factor,
                    "seeds": point.seeds or curve.seeds or self.seeds,
                }
                yield base.model_copy(update=update)


def variant_at_point(curve: str, value: str, base: str) -> str:
    """Return the name of the variant that is the main variant `base` in the setting of a curve's point.

    Args:
        curve: name of the curve.
        value: value of the point.
        base: name of the main variant.
    """
    return f"{base}.{curve}-{value}"


def _without_flags_of_experts(flags: Flags, base: Variant) -> Flags:
    """Return the flags that a variant can have: a model without experts has no number of experts."""
    return flags if base.has_experts else {name: words for name, words in flags.items() if name != "num-experts"}


def _read_with_base(path: Path) -> object:
    """Read a suite file. The suite that its key `extends` names provides the keys that the file lacks.

    Flags of both are merged. Variants, titles, and the keys that name variants are not taken from the other suite.

    Raises:
        UserError: a file cannot be read, or the other suite extends a further one.
    """
    content = read_words(path, "suite")
    if not isinstance(content, dict) or "extends" not in content:
        return content
    name = str(content.pop("extends"))
    if Path(name).name != name:
        raise UserError(f"suite {path}: `extends` must name a suite in the same folder, not {name}")
    base = read_words(path.parent / name, "suite")
    if not isinstance(base, dict) or "extends" in base:
        raise UserError(f"suite {path}: `extends` must name a suite that extends no other")
    inherited = {key: value for key, value in base.items() if key in _INHERITED_KEYS}
    for key in _MERGED_KEYS & inherited.keys() & content.keys():
        if isinstance(content[key], dict) and isinstance(inherited[key], dict):
            content[key] = {**inherited[key], **content[key]}
    return {**inherited, **content}


def _check_references(variants: Mapping[str, Variant], baselines: tuple[str, ...]) -> None:
    """Raise ValueError if a variant or a baseline names something else than a variant that is compared."""
    main = {name for name, variant in variants.items() if variant.role == "main"}
    for variant in variants.values():
        for name in {variant.tuned_as, variant.equals} - main - {None}:
            raise ValueError(f"variant {variant.name} refers to {name}, which is not a variant of the suite")
        if not variants[variant.tuned_as].is_tuned:
            raise ValueError(f"variant {variant.name} is tuned as {variant.tuned_as}, which is not tuned itself")
        if variant.equals and not set(variant.seeds) <= set(variants[variant.equals].seeds):
            raise ValueError(f"variant {variant.name} has seeds that {variant.equals} does not have")
    if unknown := [name for name in baselines if name not in main]:
        raise ValueError(f"baselines: {', '.join(unknown)} is not a variant of the suite")
