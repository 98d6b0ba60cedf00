"""The results of a comparison: collected from the parts of its runs, and compared seed by seed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.parts import Part, count_equal, identity_of
from maskmoe.comparison.run_results import Band, RunResult
from maskmoe.comparison.runs import Run, tuning_runs
from maskmoe.comparison.selection import Selection
from maskmoe.comparison.suite import Curve, Role, Suite, Variant, variant_at_point
from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags

_CONFIDENCE = 0.95
_FLAGS_OF_TOKENS = ("global-batch-size", "seq-length")


class VariantResult(BaseModel, frozen=True):
    """A variant with the settings that the report states.

    Attributes:
        name: see `Variant`.
        title: see `Variant`.
        role: see `Variant`.
        mask: flags of `maskmoe mask`; None for a model without experts.
        parameters: numbers of parameters; None if the variant differs from another variant only in its mask.
        learning_rate: learning rate of the variant's runs.
        rate_factor: see `Variant`.
        tuning: held-out loss by learning rate, if the variant was tuned itself; None if training diverged.
        tokens: number of tokens that each run was trained on.
        tokens_per_iteration: number of tokens in a step of training.
    """

    name: str
    title: str
    role: Role
    mask: Flags | None
    parameters: Parameters | None
    learning_rate: str
    rate_factor: float
    tuning: dict[str, float | None]
    tokens: int
    tokens_per_iteration: int

    def number(self, flag: str) -> float:
        """Return the value of a flag that the mask has."""
        assert self.mask is not None
        return float(self.mask[flag][0])


class LimitResult(BaseModel, frozen=True):
    """Whether a variant reproduces another variant's losses.

    Attributes:
        title: title of the variant.
        equals: name of the other variant.
        seed: seed of both runs.
        iterations: number of compared iterations.
        num_equal: number of iterations whose losses, in fp32, are the same to the last bit.
    """

    title: str
    equals: str
    seed: int
    iterations: int
    num_equal: int


class CurvePoint(BaseModel, frozen=True):
    """One setting of a curve.

    Attributes:
        value: value of the curve's quantity.
        variants: names of the variants that were trained in the setting, by the names of the main variants.
    """

    value: float
    variants: dict[str, str]


class CurveResult(BaseModel, frozen=True):
    """Settings that differ in one quantity.

    Attributes:
        name: see `Suite.curves`.
        title: see `Curve`.
        points: the settings in ascending order.
    """

    name: str
    title: str
    points: list[CurvePoint]


class Results(BaseModel, frozen=True):
    """The content of a report.

    Attributes:
        title: title of the suite.
        command: command that made the results.
        machine: machines of the runs, with the versions of torch and Megatron-Core.
        baselines: names of the variants to which the others are compared.
        method: see `Suite`.
        grid_of: name of the variant whose P and V_f the grid varies; empty without a grid.
        curves: curves with finished runs.
        variants: variants with finished runs, in order.
        runs: finished runs.
        training_seconds: durations of the trainings; a training may be that of several runs, which are equal.
        limits: finished limits.
        unfinished: seeds of the unfinished runs by variant.
        commits: commits of the code of the runs, shortened; `+` marks a checkout with uncommitted changes.
        learning_rates: learning rates that the suite tries.
    """

    title: str
    command: str
    machine: str
    baselines: list[str]
    method: str
    curves: list[CurveResult]
    variants: list[VariantResult]
    runs: list[RunResult]
    training_seconds: list[float]
    limits: list[LimitResult]
    unfinished: dict[str, list[int]]
    commits: list[str] = []
    learning_rates: list[str] = []
    grid_of: str = ""

    def of_role(self, role: Role) -> list[VariantResult]:
        """Return the variants of one role, in order."""
        return [variant for variant in self.variants if variant.role == role]

    def variant(self, name: str) -> VariantResult | None:
        """Return the variant with the name; None if the variant has no finished run."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def runs_of(self, name: str, seed: int | None = None) -> list[RunResult]:
        """Return the runs of a variant, with any seed or with one seed."""
        return [run for run in self.runs if run.variant == name and seed in (None, run.seed)]

    @property
    def baseline_variants(self) -> list[VariantResult]:
        """The baselines with finished runs."""
        return [variant for name in self.baselines if (variant := self.variant(name))]

    @property
    def bands(self) -> list[Band]:
        """The frequency bands of all runs, with the losses of the first run."""
        return self.runs[0].bands if self.runs else []

    @property
    def further(self) -> list[str]:
        """The names of all further held-out texts."""
        return list(dict.fromkeys(name for run in self.runs for name in run.further))

    @property
    def grid_base(self) -> VariantResult | None:
        """The variant whose P and V_f the grid varies; None if the variant or the grid has no finished run."""
        return self.variant(self.grid_of) if self.grid_of and self.of_role("grid") else None

    @property
    def grid_variants(self) -> dict[tuple[float, float], VariantResult]:
        """The grid's variants, with the one that the grid varies, by P and V_f, ascending."""
        if self.grid_base is None:
            return {}
        variants = {
            (variant.number("frequent-mass"), variant.number("frequent-visible-experts")): variant
            for variant in (self.grid_base, *self.of_role("grid"))
        }
        return dict(sorted(variants.items(), key=lambda item: item[0]))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95 % interval by Student's t, which suits few values.

    Attributes:
        mean: mean of the values.
        standard_error: standard error of the mean; nan if there is only one value.
        num: number of values.
    """

    mean: float
    standard_error: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the estimate from at least one value."""
        error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), float(error), len(values))

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the values; nan if there is only one value."""
        return self.standard_error * math.sqrt(self.num)

    @property
    def half_width(self) -> float:
        """Half of the width of the 95 % interval; nan if there is only one value."""
        from scipy.special import stdtrit

        if self.num < 2:
            return math.nan
        return float(stdtrit(self.num - 1, (1 + _CONFIDENCE) / 2)) * self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean; nan if there is only one value."""
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def is_resolved(self) -> bool:
        """Whether the mean differs from 0 with 95 % confidence: the interval does not contain 0."""
        return abs(self.mean) > self.half_width

    @property
    def verdict(self) -> str:
        """`Better`, `Worse` or `Not resolved`, if the mean is a difference of losses; empty for a single value."""
        if self.num < 2:
            return ""
        return "Not resolved" if not self.is_resolved else "Better" if self.mean < 0 else "Worse"

    def __format__(self, form: str) -> str:
        """Format the mean and, if there are several values, half of the width of the 95 % interval after `±`."""
        error = f" ± {format(self.half_width, form.removeprefix('+'))}" if self.num > 1 else ""
        return f"{format(self.mean, form).replace('-', '−')}{error}"


def paired_difference(
    results: Results, name: str, baseline: str, value: Callable[[RunResult], float | None]
) -> Estimate | None:
    """Estimate how a variant differs from a baseline over their common seeds; None without common seeds.

    Both runs of a pair see the same data in the same order and start from the same weights, where the models have the
    same weights. Most of the variation between seeds therefore cancels.

    Args:
        results: all results.
        name: name of the variant.
        baseline: name of the variant whose value is subtracted.
        value: returns the value of a run; None if the run does not have the value.
    """
    theirs = {run.seed: value(run) for run in results.runs_of(baseline)}
    own = {run.seed: value(run) for run in results.runs_of(name)}
    pairs = [mine - their for seed, mine in own.items() if mine is not None and (their := theirs.get(seed)) is not None]
    return Estimate.of(pairs) if pairs else None


def loss_on(held_out: str | None = None, band: str | None = None) -> Callable[[RunResult], float | None]:
    """Return a function that returns the loss of a run on a held-out text, None if the run does not have it.

    Args:
        held_out: name of a further held-out text; None for the suite's held-out text.
        band: name of a frequency band; None for all tokens.
    """
    return lambda run: losses.loss_of(band) if (losses := run.held_out(held_out)) else None


class Difference(NamedTuple):
    """How a variant differs from a baseline: its losses minus the baseline's, over all tokens, then over each band."""

    variant: VariantResult
    estimates: list[Estimate]


def differences_to(results: Results, baseline: VariantResult, held_out: str | None = None) -> list[Difference]:
    """Return how the other main variants that have seeds in common with a baseline differ from the baseline.

    Args:
        results: all results.
        baseline: the baseline.
        held_out: name of a further held-out text; None for the suite's held-out text.
    """
    differences = []
    for variant in results.of_role("main"):
        estimates = [
            paired_difference(results, variant.name, baseline.name, loss_on(held_out, band))
            for band in (None, *(band.name for band in results.bands))
        ]
        if variant != baseline and (found := [estimate for estimate in estimates if estimate]):
            differences.append(Difference(variant, found))
    return differences


def collect_results(suite: Suite, parts: Mapping[str, Part], command: str) -> Results:
    """Collect the results of all finished runs of a suite.

    Args:
        suite: the suite.
        parts: parts of the finished runs by name, which belong to the suite.
        command: command that the report states.

    Raises:
        UserError: the parts have different frequency bands.
    """
    whole_runs = Selection().whole_runs(suite)
    finished = [parts[run.name] for run in whole_runs if run.name in parts]
    runs = [part.result for part in finished if part.result]
    for run in runs:
        if [band.name for band in run.bands] != [band.name for band in runs[0].bands]:
            names = f"{runs[0].variant} with seed {runs[0].seed} and {run.variant} with seed {run.seed}"
            raise UserError(f"the runs {names} have different frequency bands; evaluate both with the same version")
    seconds = {
        identity_of(part.kind, part.evaluation is not None, part.settings, part.text): part.seconds
        for part in finished
        if part.result
    }
    origins = [part.origin for part in parts.values()]
    commits = [f"{origin.commit[:12]}{'+' if origin.is_dirty else ''}" for origin in origins if origin.commit]
    with_runs = {run.variant for run in runs}
    return Results(
        title=suite.title,
        command=command,
        machine="; ".join(sorted({origin.machine for origin in origins})),
        baselines=list(suite.baselines),
        method=suite.method,
        curves=[_curve(name, curve, with_runs) for name, curve in suite.curves.items()],
        variants=[_variant(suite, variant, parts) for name, variant in suite.variants.items() if name in with_runs],
        runs=runs,
        training_seconds=list(seconds.values()),
        limits=_compare_limits(suite, parts),
        unfinished=_unfinished_seeds(run for run in whole_runs if run.name not in parts),
        commits=sorted(set(commits)),
        learning_rates=list(suite.learning_rates.values),
        grid_of=suite.grid.of if suite.grid else "",
    )


def _unfinished_seeds(runs: Iterable[Run]) -> dict[str, list[int]]:
    """Return the seeds of runs by variant."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.variant.name, []).append(run.seed)
    return seeds


def _variant(suite: Suite, variant: Variant, parts: Mapping[str, Part]) -> VariantResult:
    """Return what the report states about a variant that has finished runs."""
    losses = {name: part.validation.last_loss for name, part in parts.items()}
    own_parts = [part for part in parts.values() if part.variant == variant.name]
    tokens_per_iteration = math.prod(int(variant.flags[flag][0]) for flag in _FLAGS_OF_TOKENS)
    (rate, *_) = [part.learning_rate for part in own_parts if part.kind == "whole"]
    own = {
        "parameters": next((part.parameters for part in own_parts if part.parameters), None),
        "learning_rate": rate,
        "tuning": {
            run.learning_rate: losses[run.name]
            for run in tuning_runs(suite)
            if run.variant.name == variant.name and run.name in losses
        },
        "tokens": int(variant.flags["train-iters"][0]) * tokens_per_iteration,
        "tokens_per_iteration": tokens_per_iteration,
    }
    return VariantResult.model_validate(dict(variant) | own)


def _curve(name: str, curve: Curve, with_runs: set[str]) -> CurveResult:
    """Return the points of a curve whose variants have finished runs."""
    points = {float(value): {base: variant_at_point(name, value, base) for base in curve.of} for value in curve.points}
    if curve.main_value:
        points[float(curve.main_value)] = {base: base for base in curve.of}
    found = {
        value: {base: variant for base, variant in variants.items() if variant in with_runs}
        for value, variants in sorted(points.items())
    }
    return CurveResult(
        name=name,
        title=curve.title,
        points=[CurvePoint(value=value, variants=variants) for value, variants in found.items() if variants],
    )


def _compare_limits(suite: Suite, parts: Mapping[str, Part]) -> list[LimitResult]:
    """Compare the losses of each finished limit with the losses that the limit must reproduce."""
    limits = []
    for run in Selection().whole_runs(suite):
        equals = run.variant.equals
        if equals is None:
            continue
        other = replace(run, variant=suite.variants[equals])
        if run.name in parts and other.name in parts:
            number, num_equal = count_equal(parts[run.name].exact_losses, parts[other.name].exact_losses)
            title = run.variant.title
            limits.append(
                LimitResult(title=title, equals=equals, seed=run.seed, iterations=number, num_equal=num_equal)
            )
    return limits
