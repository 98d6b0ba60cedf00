"""Suite files: YAML that says which variants of a model are compared, and how they are trained."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskmoe.errors import UserError
from maskmoe.launch.model_file import LAYOUTS, Flags, ModelFile, override, parse_flags, parse_layouts, read_words

Role = Literal["main", "grid", "limit"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SUITE_KEYS = {
    *("title", "data", "model", "flags", "expert-flags", "mask", "seeds", "learning-rates", "variants", "grid"),
    *("checkpoints", "keep-checkpoints", "probe-tokens", "baselines"),
}
_VARIANT_KEYS = {"title", "model", "flags", LAYOUTS, "mask", "seeds", "tuned-as", "equals", "until"}
_GRID_KEYS = {"of", "frequent-mass", "frequent-visible-experts", "seeds"}
_LEARNING_RATE_KEYS = {"values", "iterations", "min-share"}
_DATA_KEYS = {"input", "max-bytes", "vocab-size", "data-path", "split", "tokenizer-type", "tokenizer-model"}
_DECIDED = {"seed", "save", "load", "routing-mask", "data-path"}


@dataclass(frozen=True)
class Variant:
    """A model to be trained.

    Attributes:
        name: in file names.
        title: in the report.
        role: `main`: of the comparison. `grid`: another P or V_f of a main variant. `limit`: must equal another one.
        mask: flags of tools/build_routing_mask.py; None for a model without experts.
        flags: of training, all but those that runs differ in.
        layouts: further flags by number of ranks, see `ModelFile`.
        tuned_as: the variant whose learning rate it takes; its own name if it is tuned itself.
        equals: for a limit, the variant whose losses it must reproduce to the last bit.
        until: the iteration at which it stops, if not at the end.
        seeds: of its runs.
    """

    name: str
    title: str
    role: Role
    mask: Flags | None
    flags: Flags
    layouts: Mapping[int, Flags]
    tuned_as: str
    equals: str | None
    until: int | None
    seeds: tuple[int, ...]

    @property
    def has_experts(self) -> bool:
        """Whether there is something to route."""
        return self.mask is not None

    @property
    def is_tuned(self) -> bool:
        """Whether its own learning rate is sought."""
        return self.tuned_as == self.name

    def number(self, flag: str) -> float | None:
        """The value of a flag of its mask, if it has one."""
        return float(self.mask[flag][0]) if self.mask and flag in self.mask else None


@dataclass(frozen=True)
class Suite:
    """What is compared.

    Attributes:
        name: of the file.
        title: of the report.
        data: flags that say what text there is.
        variants: in the order of the report.
        baselines: names of the variants to which the others are compared, seed by seed.
        learning_rates: the values that are tried for every tuned variant, as words, ascending.
        tuning_iterations: how long for.
        min_share: the smallest learning rate of a run, as a share of the largest.
        checkpoints: of a run, evenly spaced.
        keeps_checkpoints: whether all stay when it is known how they route; else only the last.
        probe_tokens: tokens of held-out text whose routing is looked at.
    """

    name: str
    title: str
    data: Flags
    variants: tuple[Variant, ...]
    baselines: tuple[str, ...]
    learning_rates: tuple[str, ...]
    tuning_iterations: int
    min_share: float
    checkpoints: int
    keeps_checkpoints: bool
    probe_tokens: int

    @classmethod
    def read(cls, path: Path, variables: Mapping[str, str]) -> "Suite":
        """Read a suite file.

        Args:
            path: the file.
            variables: for `${NAME}` in values.

        Raises:
            UserError: it cannot be read, or does not describe a suite.
        """
        return _Reader(path, variables).suite()

    def __getitem__(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def of_role(self, role: Role) -> tuple[Variant, ...]:
        """The variants of one role, in order."""
        return tuple(variant for variant in self.variants if variant.role == role)


class _Reader:
    """Turns the content of a suite file into a suite."""

    def __init__(self, path: Path, variables: Mapping[str, str]):
        self._path = path
        self._variables = variables
        content = read_words(path, "suite")
        if not isinstance(content, dict) or not isinstance(content.get("variants"), dict) or not content["variants"]:
            raise UserError(f"suite {path} must name its variants: `variants: {{smoe: …}}`")
        self._content: dict = content

    def suite(self) -> Suite:
        content = self._content
        self._check_keys(content, _SUITE_KEYS, "")
        rates = self._mapping(content, "learning-rates", _LEARNING_RATE_KEYS)
        values = sorted(self._list(rates, "values", "learning-rates"), key=self._positive)
        variants = [self._variant(name, spec or {}) for name, spec in content["variants"].items()]
        variants += self._grid(variants)
        self._check_references(variants)
        baselines = self._list(content, "baselines", "") if "baselines" in content else [variants[0].name]
        if unknown := [name for name in baselines if name not in {v.name for v in variants if v.role == "main"}]:
            raise self._error(f"baselines: {', '.join(unknown)} is none of the variants")
        return Suite(
            name=self._path.stem,
            title=content.get("title", self._path.stem),
            data=self._flags(content.get("data", {}), "data", _DATA_KEYS),
            variants=tuple(variants),
            baselines=tuple(baselines),
            learning_rates=tuple(values),
            tuning_iterations=self._count(rates, "iterations", "learning-rates"),
            min_share=self._positive(rates.get("min-share", "0.1")),
            checkpoints=self._count(content, "checkpoints", "", default="8"),
            keeps_checkpoints=self._choice(content, "keep-checkpoints", ("all", "last")) == "all",
            probe_tokens=self._count(content, "probe-tokens", "", default="16384"),
        )

    def _variant(self, name: str, spec: object) -> Variant:
        where = f"variant {name}"
        if not _NAME.fullmatch(name):
            raise self._error(f"{where}: a name is made of letters, digits and . _ + -, since it names a folder")
        if not isinstance(spec, dict):
            raise self._error(f"{where} must hold {', '.join(sorted(_VARIANT_KEYS))}")
        self._check_keys(spec, _VARIANT_KEYS, where)
        mask = None
        if "mask" in spec:
            common = self._flags(self._content.get("mask", {}), "mask")
            own = self._flags(spec["mask"], f"{where}: mask")
            # A preset decides what the common flags would decide otherwise.
            kept = {"seed", "shared-table", "expert-model-parallel-size"} if "preset" in own else set(common)
            mask = override({flag: words for flag, words in common.items() if flag in kept}, own)
        flags, layouts = self._training_flags(spec, mask is not None, where)
        equals = spec.get("equals")
        return Variant(
            name=name,
            title=spec.get("title", name),
            role="main" if equals is None else "limit",
            mask=mask,
            flags=flags,
            layouts=layouts,
            tuned_as=spec.get("tuned-as", equals or name),
            equals=equals,
            until=self._count(spec, "until", where) if "until" in spec else None,
            seeds=self._seeds(spec, where),
        )

    def _training_flags(self, spec: dict, has_experts: bool, where: str) -> tuple[Flags, Mapping[int, Flags]]:
        content, flags, layouts = self._content, {}, {}
        model = spec.get("model", content.get("model"))
        if model is not None:
            file = ModelFile.read(self._path.parent / model, self._variables)
            flags, layouts = file.flags, file.layouts
        layouts = {**layouts, **parse_layouts(spec.get(LAYOUTS, {}), f"suite {self._path}: {where}", self._variables)}
        flags = override(flags, self._raw_flags(content.get("flags", {}), "flags"))
        if has_experts:
            flags = override(flags, self._raw_flags(content.get("expert-flags", {}), "expert-flags"))
        flags = override(flags, self._raw_flags(spec.get("flags", {}), f"{where}: flags"))
        for needed in ("train-iters", "seq-length", "num-layers", *(("num-experts",) if has_experts else ())):
            if needed not in flags:
                raise self._error(f"{where} has no {needed} among its flags")
        if decided := sorted(_DECIDED & flags.keys()):
            raise self._error(f"{where}: {', '.join(decided)} is decided by the comparison; leave it out")
        return flags, layouts

    def _grid(self, variants: Sequence[Variant]) -> Iterator[Variant]:
        if "grid" not in self._content:
            return
        spec = self._mapping(self._content, "grid", _GRID_KEYS)
        base = next((variant for variant in variants if variant.name == spec.get("of")), None)
        if base is None or not base.has_experts:
            raise self._error(f"grid: `of: {spec.get('of')}` must name a variant that has a mask")
        masses = self._list(spec, "frequent-mass", "grid")
        numbers = self._list(spec, "frequent-visible-experts", "grid")
        for mass, number in itertools.product(masses, numbers):
            if (self._positive(mass), self._positive(number)) == (
                base.number("frequent-mass"),
                base.number("frequent-visible-experts"),
            ):
                continue
            yield Variant(
                name=f"{base.name}.p{mass}-v{number}",
                title=f"{base.title}, P = {mass}, V_f = {number}",
                role="grid",
                mask={**base.mask, "frequent-mass": (mass,), "frequent-visible-experts": (number,)},
                flags=base.flags,
                layouts=base.layouts,
                tuned_as=base.tuned_as,
                equals=None,
                until=None,
                seeds=self._seeds(spec, "grid"),
            )

    def _check_references(self, variants: Sequence[Variant]) -> None:
        by_name = {variant.name: variant for variant in variants}
        for variant in variants:
            for name in (variant.tuned_as, variant.equals):
                if name is not None and (name not in by_name or by_name[name].role != "main"):
                    raise self._error(f"variant {variant.name} refers to {name}, which is none of the variants")
            if not by_name[variant.tuned_as].is_tuned:
                raise self._error(f"variant {variant.name} is tuned as {variant.tuned_as}, which is not tuned itself")
            if variant.equals and not set(variant.seeds) <= set(by_name[variant.equals].seeds):
                raise self._error(f"variant {variant.name} has seeds that {variant.equals} has not")

    def _raw_flags(self, content: object, where: str) -> Flags:
        """Flags in which `false` stands for one to be taken away."""
        if isinstance(content, dict):
            content = {name: ["false"] if value == "false" else value for name, value in content.items()}
        return self._flags(content, where)

    def _flags(self, content: object, where: str, known: set[str] | None = None) -> Flags:
        flags = parse_flags(content, f"suite {self._path}: {where}", self._variables)
        if known is not None:
            self._check_keys(flags, known, where)
        return flags

    def _mapping(self, content: Mapping, key: str, known: set[str]) -> dict:
        if not isinstance(content.get(key), dict):
            raise self._error(f"`{key}` must hold {', '.join(sorted(known))}")
        self._check_keys(content[key], known, key)
        return content[key]

    def _list(self, content: Mapping, key: str, where: str) -> list[str]:
        values = content.get(key)
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise self._error(f"{where}: {key} must be a list of values")
        return values

    def _seeds(self, content: Mapping, where: str) -> tuple[int, ...]:
        key = "seeds"
        seeds = self._list(content if key in content else {key: self._content.get(key, ["1"])}, key, where)
        if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
            raise self._error(f"{where}: seeds must be different whole numbers, not {', '.join(seeds)}")
        return tuple(map(int, seeds))

    def _count(self, content: Mapping, key: str, where: str, default: str | None = None) -> int:
        word = content.get(key, default)
        if not isinstance(word, str) or not word.isdecimal() or int(word) < 1:
            raise self._error(f"{where}{': ' if where else ''}{key} must be a whole number from 1, not {word}")
        return int(word)

    def _choice(self, content: Mapping, key: str, choices: Sequence[str]) -> str:
        """One of the words, the first if there is none."""
        word = content.get(key, choices[0])
        if word not in choices:
            raise self._error(f"{key} must be {' or '.join(choices)}, not {word}")
        return word

    def _positive(self, word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise self._error(f"{word!r} is no number")
        return value

    def _check_keys(self, content: Mapping, known: set[str], where: str) -> None:
        if unknown := sorted(set(content) - known):
            place = f"{where}: " if where else ""
            raise self._error(f"{place}unknown {', '.join(unknown)}; there are {', '.join(sorted(known))}")

    def _error(self, message: str) -> UserError:
        return UserError(f"suite {self._path}: {message}")
