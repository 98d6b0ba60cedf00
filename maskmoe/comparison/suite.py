"""Suites: which variants of a model are compared and how the variants are trained."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from maskmoe.comparison.suite_file import SuiteFile, VariantSection
from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags, ModelFile, override, parse_flags, parse_layouts

Role = Literal["main", "grid", "limit"]

_DATA_FLAGS = {"input", "max-bytes", "vocab-size", "data-path", "split", "tokenizer-type", "tokenizer-model"}
_DECIDED_FLAGS = {"seed", "save", "load", "routing-mask", "data-path"}
# A preset decides all other flags of the mask.
_FLAGS_BESIDE_PRESET = {"seed", "shared-table", "expert-model-parallel-size"}


@dataclass(frozen=True)
class Variant:
    """A model to be trained.

    Attributes:
        name: name in file names.
        title: name in the report.
        role: `main`: a variant that is compared. `grid`: another P or V_f of a main variant. `limit`: a variant that
            must reproduce another variant's losses.
        mask: flags of `maskmoe mask`; None for a model without experts.
        flags: flags of training, without the flags in which the runs of a variant differ.
        layouts: further flags by number of ranks, see `ModelFile`.
        tuned_as: name of the variant whose learning rate is used; the own name if the variant is tuned itself.
        equals: for a limit, name of the variant whose losses must be reproduced to the last bit; else None.
        until: iteration at which training stops early; None to train to the end.
        seeds: seeds of the variant's runs.
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
        """Whether the model has experts."""
        return self.mask is not None

    @property
    def is_tuned(self) -> bool:
        """Whether the variant's own learning rate is searched."""
        return self.tuned_as == self.name

    def number(self, flag: str) -> float | None:
        """Return the value of a flag of the mask; None if the mask does not have the flag."""
        return float(self.mask[flag][0]) if self.mask and flag in self.mask else None


@dataclass(frozen=True)
class Suite:
    """The variants that are compared, and how the variants are trained.

    Attributes:
        name: name of the file, without its suffix.
        title: title of the report.
        data: flags that describe the text, see `open_data`.
        variants: variants in the order of the report.
        baselines: names of the variants to which the others are compared, seed by seed.
        learning_rates: learning rates that are tried for every tuned variant, as words, ascending.
        tuning_iterations: iterations of the runs that try learning rates.
        min_share: smallest learning rate of a run, as a share of the largest.
        checkpoints: number of evenly spaced checkpoints of a run.
        keeps_checkpoints: whether all checkpoints are kept after their routing was analyzed, or only the last.
        probe_tokens: tokens of held-out text whose routing is analyzed.
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
            variables: values for `${NAME}` in the file.

        Raises:
            UserError: the file cannot be read or does not describe a suite.
        """
        return _Reader(path, variables).suite()

    def __getitem__(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def seq_length(self) -> int:
        """Tokens in a sample."""
        return int(self.variants[0].flags["seq-length"][0])

    def of_role(self, role: Role) -> tuple[Variant, ...]:
        """Return the variants of one role, in order."""
        return tuple(variant for variant in self.variants if variant.role == role)


class _Reader:
    """Builds a suite from the sections of its file."""

    def __init__(self, path: Path, variables: Mapping[str, str]) -> None:
        self._path = path
        self._variables = variables
        self._file = SuiteFile.read(path)

    def suite(self) -> Suite:
        """Return the suite."""
        file = self._file
        variants = [self._variant(name, section) for name, section in file.variants.items()]
        variants += self._grid(variants)
        self._check_references(variants)
        baselines = file.baselines or (variants[0].name,)
        main = {variant.name for variant in variants if variant.role == "main"}
        if unknown := [name for name in baselines if name not in main]:
            raise self._error(f"baselines: {', '.join(unknown)} is not a variant of the suite")
        data = self._flags(file.data, "data")
        if unknown := sorted(data.keys() - _DATA_FLAGS):
            raise self._error(
                f"data: unknown {', '.join(unknown)}; the known keys are {', '.join(sorted(_DATA_FLAGS))}"
            )
        return Suite(
            name=self._path.stem,
            title=file.title or self._path.stem,
            data=data,
            variants=tuple(variants),
            baselines=baselines,
            learning_rates=tuple(sorted(file.learning_rates.values, key=float)),
            tuning_iterations=file.learning_rates.iterations,
            min_share=float(file.learning_rates.min_share),
            checkpoints=file.checkpoints,
            keeps_checkpoints=file.keep_checkpoints == "all",
            probe_tokens=file.probe_tokens,
        )

    def _variant(self, name: str, section: VariantSection) -> Variant:
        where = f"variant {name}"
        mask = self._mask(section, where)
        flags, layouts = self._training_flags(section, mask is not None, where)
        return Variant(
            name=name,
            title=section.title or name,
            role="main" if section.equals is None else "limit",
            mask=mask,
            flags=flags,
            layouts=layouts,
            tuned_as=section.tuned_as or section.equals or name,
            equals=section.equals,
            until=section.until,
            seeds=section.seeds or self._file.seeds,
        )

    def _mask(self, section: VariantSection, where: str) -> Flags | None:
        """Merge the common flags of masks with the variant's own."""
        if section.mask is None:
            return None
        common = self._flags(self._file.mask, "mask")
        own = self._flags(section.mask, f"{where}: mask")
        if "preset" in own:
            common = {flag: words for flag, words in common.items() if flag in _FLAGS_BESIDE_PRESET}
        return override(common, own)

    def _training_flags(
        self, section: VariantSection, has_experts: bool, where: str
    ) -> tuple[Flags, Mapping[int, Flags]]:
        """Merge the flags of the model file, the suite and the variant; later flags replace earlier ones."""
        flags: Flags = {}
        layouts: Mapping[int, Flags] = {}
        if (model := section.model or self._file.model) is not None:
            model_file = ModelFile.read(self._path.parent / model, self._variables)
            flags, layouts = model_file.flags, model_file.layouts
        own_layouts = parse_layouts(section.layouts, f"suite {self._path}: {where}", self._variables)
        flags = override(flags, self._flags_with_removals(self._file.flags, "flags"))
        if has_experts:
            flags = override(flags, self._flags_with_removals(self._file.expert_flags, "expert-flags"))
        flags = override(flags, self._flags_with_removals(section.flags, f"{where}: flags"))
        for needed in ("train-iters", "seq-length", "num-layers", *(("num-experts",) if has_experts else ())):
            if needed not in flags:
                raise self._error(f"{where} has no {needed} among its flags")
        if decided := sorted(_DECIDED_FLAGS & flags.keys()):
            raise self._error(f"{where}: {', '.join(decided)} is decided by the comparison; leave the flag out")
        return flags, {**layouts, **own_layouts}

    def _grid(self, variants: Sequence[Variant]) -> Iterator[Variant]:
        """Yield a variant for each further pair of P and V_f."""
        grid = self._file.grid
        if grid is None:
            return
        base = next((variant for variant in variants if variant.name == grid.of), None)
        if base is None or base.mask is None:
            raise self._error(f"grid: `of: {grid.of}` must name a variant that has a mask")
        own = base.number("frequent-mass"), base.number("frequent-visible-experts")
        for mass, number in itertools.product(grid.frequent_mass, grid.frequent_visible_experts):
            if (float(mass), float(number)) != own:
                yield replace(
                    base,
                    name=f"{base.name}.p{mass}-v{number}",
                    title=f"{base.title}, P = {mass}, V_f = {number}",
                    role="grid",
                    mask={**base.mask, "frequent-mass": (mass,), "frequent-visible-experts": (number,)},
                    equals=None,
                    until=None,
                    seeds=grid.seeds or self._file.seeds,
                )

    def _check_references(self, variants: Sequence[Variant]) -> None:
        by_name = {variant.name: variant for variant in variants}
        for variant in variants:
            for name in (variant.tuned_as, variant.equals):
                if name is not None and (name not in by_name or by_name[name].role != "main"):
                    raise self._error(f"variant {variant.name} refers to {name}, which is not a variant of the suite")
            if not by_name[variant.tuned_as].is_tuned:
                raise self._error(f"variant {variant.name} is tuned as {variant.tuned_as}, which is not tuned itself")
            if variant.equals and not set(variant.seeds) <= set(by_name[variant.equals].seeds):
                raise self._error(f"variant {variant.name} has seeds that {variant.equals} does not have")

    def _flags_with_removals(self, content: object, where: str) -> Flags:
        """Parse flags and keep `false` as a word, which removes a flag of an earlier section."""
        if isinstance(content, dict):
            content = {name: ["false"] if value == "false" else value for name, value in content.items()}
        return self._flags(content, where)

    def _flags(self, content: object, where: str) -> Flags:
        return parse_flags(content, f"suite {self._path}: {where}", self._variables)

    def _error(self, message: str) -> UserError:
        return UserError(f"suite {self._path}: {message}")
