"""The results of a comparison: read from the files of its runs, kept as JSON, compared seed by seed."""

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.runs import Run, choose_learning_rates, tuning_runs
from maskmoe.comparison.suite import Role, Variant
from maskmoe.json_files import read_json, read_record, write_record
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.training_log import IterationRecord, ValidationRecord

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """Losses by iteration, in nats per token."""

    iterations: list[int]
    losses: list[float]


@dataclass(frozen=True)
class RoutingHistory:
    """How the checkpoints of a run route a fixed text, as `maskmoe analyze` has written.

    A value that does not exist is None, for example the entropy of a layer in which no token has a choice.

    Attributes:
        layers: numbers of the layers with experts.
        iterations: iterations of the checkpoints.
        entropy: [checkpoints, layers], mean entropy of the router in nats, over tokens with a choice.
        fluctuation: [checkpoints - 1, layers], share of all tokens' experts that changed since the checkpoint before.
        routable_fluctuation: [checkpoints - 1, layers], the same share over tokens with a choice.
        single_expert_token_share: [layers], share of tokens without a choice.
        id_information: [layers], mutual information of expert and id at the last checkpoint, in nats.
        distinct_experts: by band, [layers], number of experts that process an id's occurrences at the last checkpoint.
    """

    layers: list[int]
    iterations: list[int]
    entropy: list[list[float | None]]
    fluctuation: list[list[float]]
    routable_fluctuation: list[list[float | None]]
    single_expert_token_share: list[float]
    id_information: list[float]
    distinct_experts: dict[str, list[float | None]]

    @classmethod
    def read(cls, path: Path) -> "RoutingHistory":
        """Read routing.json. Raises UserError if the file cannot be read."""
        content = read_json(path)
        checkpoints, changes = content["checkpoints"], content["fluctuation"]
        last = checkpoints[-1]
        return cls(
            layers=content["layers"],
            iterations=[checkpoint["iteration"] for checkpoint in checkpoints],
            entropy=[checkpoint["entropy"] for checkpoint in checkpoints],
            fluctuation=[change["by_layer"] for change in changes],
            routable_fluctuation=[change["routable_by_layer"] for change in changes],
            single_expert_token_share=last["single_expert_token_share"],
            id_information=last["id_expert_information"],
            distinct_experts={name: band["by_layer"] for name, band in last["distinct_experts"]["by_band"].items()},
        )

    @property
    def has_choice(self) -> bool:
        """Whether any token has a choice among experts."""
        return min(self.single_expert_token_share) < 1


@dataclass(frozen=True)
class Band:
    """The loss of the held-out tokens whose ids belong to one frequency band.

    Attributes:
        name: name of the band.
        share: share of the band in all held-out tokens.
        loss: mean loss in nats per token.
    """

    name: str
    share: float
    loss: float


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        variant: name of the variant.
        seed: seed of the run.
        seconds: duration of the training.
        training: losses of training.
        validation: losses of a part of the held-out text during training.
        loss: loss of all held-out text after training, in nats per token.
        bands: the same loss by frequency band.
        load: for each layer with experts, the number of held-out tokens that each expert got.
        routing: routing of each checkpoint; None for a model without experts.
    """

    variant: str
    seed: int
    seconds: float
    training: Curve
    validation: Curve
    loss: float
    bands: list[Band]
    load: list[list[int]]
    routing: RoutingHistory | None

    def band_loss(self, name: str) -> float:
        """Return the loss of one band."""
        return next(band.loss for band in self.bands if band.name == name)


@dataclass(frozen=True)
class VariantResult:
    """A variant with the settings that the report states.

    Attributes:
        name: see `Variant`.
        title: see `Variant`.
        role: see `Variant`.
        mask: flags of `maskmoe mask`; None for a model without experts.
        parameters: numbers of parameters; None if the variant differs from another variant only in its mask.
        learning_rate: learning rate of the variant's runs.
        tuning: held-out loss by learning rate, if the variant was tuned itself; None if training diverged.
        tokens: number of tokens that each run was trained on.
    """

    name: str
    title: str
    role: Role
    mask: dict[str, list[str]] | None
    parameters: Parameters | None
    learning_rate: str
    tuning: dict[str, float | None]
    tokens: int

    def number(self, flag: str) -> float:
        """Return the value of a flag that the mask has."""
        assert self.mask is not None
        return float(self.mask[flag][0])


@dataclass(frozen=True)
class LimitResult:
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


@dataclass(frozen=True)
class Results:
    """The content of a report.

    Attributes:
        title: title of the suite.
        command: command that made the results.
        machine: machine of the runs, with the versions of torch and Megatron-Core.
        baselines: names of the variants to which the others are compared.
        variants: variants with finished runs, in order.
        runs: finished runs.
        limits: finished limits.
        unfinished: names of unfinished runs.
    """

    title: str
    command: str
    machine: str
    baselines: list[str]
    variants: list[VariantResult]
    runs: list[RunResult]
    limits: list[LimitResult]
    unfinished: list[str]

    def of_role(self, role: Role) -> list[VariantResult]:
        """Return the variants of one role, in order."""
        return [variant for variant in self.variants if variant.role == role]

    def variant(self, name: str) -> VariantResult | None:
        """Return the variant with the name; None if the variant has no finished run."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def runs_of(self, name: str) -> list[RunResult]:
        """Return the runs of a variant."""
        return [run for run in self.runs if run.variant == name]

    @property
    def baseline_variants(self) -> list[VariantResult]:
        """The baselines with finished runs."""
        return [variant for name in self.baselines if (variant := self.variant(name))]

    @property
    def grid_base(self) -> VariantResult:
        """The variant whose P and V_f the grid varies. There must be a grid."""
        name = self.of_role("grid")[0].name
        return next(variant for variant in self.of_role("main") if name.startswith(f"{variant.name}."))

    def band_names(self) -> list[str]:
        """Return the names of the frequency bands."""
        return [band.name for band in self.runs[0].bands] if self.runs else []

    def save(self, path: Path) -> None:
        """Write the results as JSON."""
        write_record(self, path)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read results that `save` has written. Raises UserError if the file cannot be read."""
        return read_record(cls, path, "write the report again")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

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
    def is_resolved(self) -> bool:
        """Whether the mean differs from 0 with 95 % confidence by Student's t, which suits few values."""
        from scipy.special import stdtrit

        if self.num < 2:
            return False
        quantile = stdtrit(self.num - 1, (1 + _CONFIDENCE) / 2)
        return bool(abs(self.mean) > quantile * self.standard_error)


def paired_difference(
    results: Results, name: str, baseline: str, value: Callable[[RunResult], float]
) -> Estimate | None:
    """Estimate how a variant differs from a baseline over their common seeds; None without common seeds.

    Both runs of a pair see the same data in the same order and start from the same weights, where the models have the
    same weights. Most of the variation between seeds therefore cancels.

    Args:
        results: all results.
        name: name of the variant.
        baseline: name of the variant whose value is subtracted.
        value: returns the value of a run.
    """
    of_baseline = {run.seed: value(run) for run in results.runs_of(baseline)}
    pairs = [value(run) - of_baseline[run.seed] for run in results.runs_of(name) if run.seed in of_baseline]
    return Estimate.of(pairs) if pairs else None


def collect_results(comparison: Comparison, command: str) -> Results:
    """Read the results of all finished runs of a comparison.

    Args:
        comparison: the comparison, which need not be finished.
        command: command that the report states.
    """
    suite = comparison.suite
    losses = comparison.tuning_losses()
    rates = choose_learning_rates(suite, losses)
    parameters = comparison.parameters()
    runs: list[RunResult] = []
    limits: list[LimitResult] = []
    unfinished: list[str] = []
    for run in comparison.whole_runs():
        if not comparison.is_finished(run):
            unfinished.append(run.name)
        elif run.variant.equals is not None:
            limits.append(_compare_limit(comparison, run, run.variant.equals))
        else:
            runs.append(_read_run(comparison, run))
    found = {run.variant for run in runs}
    variants = [
        VariantResult(
            name=variant.name,
            title=variant.title,
            role=variant.role,
            mask=None if variant.mask is None else {flag: list(words) for flag, words in variant.mask.items()},
            parameters=parameters.get(variant.name),
            learning_rate=rates[variant.name],
            tuning={run.learning_rate: losses[run.name] for run in tuning_runs(suite) if run.variant == variant},
            tokens=_trained_tokens(variant),
        )
        for variant in suite.variants
        if variant.name in found
    ]
    machine = _describe_machine(comparison)
    return Results(suite.title, command, machine, list(suite.baselines), variants, runs, limits, unfinished)


def _trained_tokens(variant: Variant) -> int:
    return math.prod(int(variant.flags[name][0]) for name in ("train-iters", "global-batch-size", "seq-length"))


def _read_run(comparison: Comparison, run: Run) -> RunResult:
    plan = comparison.plan(run)
    evaluation = read_json(plan.files.evaluation)
    history = plan.history()
    return RunResult(
        variant=run.variant.name,
        seed=run.seed,
        seconds=RunRecord(plan.files.record)["train"].seconds,
        training=_curve(history.iterations),
        validation=_curve(history.validations),
        loss=evaluation["loss"],
        bands=[Band(band["name"], band["share"], band["loss"]) for band in evaluation["bands"]],
        load=[load["tokens_per_expert"] for load in evaluation["expert_load"]],
        routing=RoutingHistory.read(plan.files.routing / "routing.json") if run.variant.has_experts else None,
    )


def _curve(records: Mapping[int, IterationRecord] | Mapping[int, ValidationRecord]) -> Curve:
    points = {iteration: record.loss for iteration, record in sorted(records.items()) if record.loss is not None}
    return Curve(list(points), list(points.values()))


def _compare_limit(comparison: Comparison, run: Run, equals: str) -> LimitResult:
    """Compare the losses of a limit with the losses of the variant that the limit must reproduce."""
    other = replace(run, variant=comparison.suite[equals])
    own_losses, other_losses = (_exact_losses(comparison.plan(each).files.tensorboard) for each in (run, other))
    common = own_losses.keys() & other_losses.keys()
    num_equal = sum(own_losses[iteration] == other_losses[iteration] for iteration in common)
    return LimitResult(run.variant.title, equals, run.seed, len(common), num_equal)


def _exact_losses(tensorboard: Path) -> dict[int, float]:
    """Return the training losses by iteration with the precision of fp32, which the text log does not have."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(os.fspath(tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("lm loss")}


def _describe_machine(comparison: Comparison) -> str:
    devices = comparison.devices
    machine = f"{devices.num_gpus} GPUs" if devices.num_gpus else f"{devices.num_cores} cores, {_processor()}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return f"{machine} ({packages})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
