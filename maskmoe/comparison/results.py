"""The results of a comparison: read from the files of its runs, kept as JSON, compared seed by seed."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.runs import Run, choose_learning_rates, tuning_runs
from maskmoe.comparison.suite import Role
from maskmoe.json_files import read_json
from maskmoe.launch.devices import Devices
from maskmoe.launch.model_file import Flags
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.training_log import IterationRecord, ValidationRecord

_CONFIDENCE = 0.95
_FLAGS_OF_TOKENS = ("train-iters", "global-batch-size", "seq-length")


class Curve(BaseModel, frozen=True):
    """Losses by iteration, in nats per token."""

    iterations: list[int]
    losses: list[float]

    @classmethod
    def of(cls, records: Mapping[int, IterationRecord] | Mapping[int, ValidationRecord]) -> "Curve":
        """Return the curve of the finite losses among the records of a training log."""
        points = {iteration: record.loss for iteration, record in sorted(records.items()) if record.loss is not None}
        return cls(iterations=list(points), losses=list(points.values()))


class RoutingHistory(BaseModel, frozen=True):
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


class Band(BaseModel, frozen=True):
    """The loss of the held-out tokens whose ids belong to one frequency band.

    Attributes:
        name: name of the band.
        share: share of the band in all held-out tokens.
        loss: mean loss in nats per token.
    """

    name: str
    share: float
    loss: float


class RunResult(BaseModel, frozen=True):
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
        routing: routing of each checkpoint; None for a model without experts, or if it was not analyzed.
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

    def held_out_loss(self, iteration: int) -> float:
        """Return the loss of a part of the held-out text after an iteration of `validation`."""
        return self.validation.losses[self.validation.iterations.index(iteration)]

    def loss_of(self, band: str | None) -> float:
        """Return the loss of one band by its name, or of all tokens for None."""
        return next((each.loss for each in self.bands if each.name == band), self.loss)


class VariantResult(BaseModel, frozen=True):
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
    mask: Flags | None
    parameters: Parameters | None
    learning_rate: str
    tuning: dict[str, float | None]
    tokens: int

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


class Results(BaseModel, frozen=True):
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
    def grid_base(self) -> VariantResult:
        """The variant whose P and V_f the grid varies. There must be a grid."""
        name = self.of_role("grid")[0].name
        return next(variant for variant in self.of_role("main") if name.startswith(f"{variant.name}."))

    @property
    def grid_seed(self) -> int:
        """The seed of the runs in the grid's table and plot. There must be a grid."""
        return self.runs_of(self.of_role("grid")[0].name)[0].seed

    def grid_runs(self) -> dict[tuple[float, float], RunResult]:
        """Return the runs of the grid's seed by P and V_f, ascending. There must be a grid."""
        runs = {
            (variant.number("frequent-mass"), variant.number("frequent-visible-experts")): run
            for variant in (self.grid_base, *self.of_role("grid"))
            for run in self.runs_of(variant.name, self.grid_seed)
        }
        return dict(sorted(runs.items(), key=lambda item: item[0]))


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

    @property
    def verdict(self) -> str:
        """`Better`, `Worse` or `Not resolved`, if the mean is a difference of losses; empty for a single value."""
        if self.num < 2:
            return ""
        return "Not resolved" if not self.is_resolved else "Better" if self.mean < 0 else "Worse"

    def __format__(self, form: str) -> str:
        """Format the mean, and its standard error if there are several values."""
        error = f" ± {format(self.standard_error, form.removeprefix('+'))}" if self.num > 1 else ""
        return f"{format(self.mean, form)}{error}"


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


class Difference(NamedTuple):
    """How a variant differs from a baseline: its losses minus the baseline's, over all tokens, then over each band."""

    variant: VariantResult
    estimates: list[Estimate]


def differences_to(results: Results, baseline: VariantResult) -> list[Difference]:
    """Return how the other main variants that have seeds in common with a baseline differ from the baseline."""
    differences = []
    for variant in results.of_role("main"):
        estimates = [
            paired_difference(results, variant.name, baseline.name, methodcaller("loss_of", band))
            for band in (None, *(band.name for band in results.bands))
        ]
        if variant != baseline and (found := [estimate for estimate in estimates if estimate]):
            differences.append(Difference(variant, found))
    return differences


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
    whole_runs = comparison.whole_runs()
    unfinished = comparison.unfinished(whole_runs)
    finished = [run for run in whole_runs if run not in unfinished]
    runs = [_read_run(comparison, run) for run in finished if run.is_analyzed]
    variants = []
    for variant in suite.variants.values():
        own = {
            "parameters": parameters.get(variant.name),
            "learning_rate": rates[variant.name],
            "tuning": {run.learning_rate: losses[run.name] for run in tuning_runs(suite) if run.variant == variant},
            "tokens": math.prod(int(variant.flags[flag][0]) for flag in _FLAGS_OF_TOKENS),
        }
        if variant.name in {run.variant for run in runs}:
            variants.append(VariantResult.model_validate(dict(variant) | own))
    return Results(
        title=suite.title,
        command=command,
        machine=_describe_machine(comparison.devices),
        baselines=list(suite.baselines),
        variants=variants,
        runs=runs,
        limits=[_compare_limit(comparison, run) for run in finished if not run.is_analyzed],
        unfinished=[run.name for run in unfinished],
    )


def _read_run(comparison: Comparison, run: Run) -> RunResult:
    plan = comparison.plan(run)
    evaluation, history = read_json(plan.files.evaluation), plan.history()
    own = {
        "variant": run.variant.name,
        "seed": run.seed,
        "seconds": RunRecord(plan.files.record)["train"].seconds,
        "training": Curve.of(history.iterations),
        "validation": Curve.of(history.validations),
        "load": [load["tokens_per_expert"] for load in evaluation["expert_load"]],
        "routing": RoutingHistory.read(plan.files.routing / "routing.json") if plan.analyzes_routing else None,
    }
    return RunResult.model_validate(evaluation | own)


def _compare_limit(comparison: Comparison, run: Run) -> LimitResult:
    """Compare the losses of a limit with the losses of the variant that the limit must reproduce."""
    equals = run.variant.equals or ""
    other = replace(run, variant=comparison.suite.variants[equals])
    own_losses, other_losses = (_exact_losses(comparison.plan(each).files.tensorboard) for each in (run, other))
    are_equal = [own_losses[iteration] == other_losses[iteration] for iteration in own_losses.keys() & other_losses]
    title, seed = run.variant.title, run.seed
    return LimitResult(title=title, equals=equals, seed=seed, iterations=len(are_equal), num_equal=sum(are_equal))


def _exact_losses(tensorboard: Path) -> dict[int, float]:
    """Return the training losses by iteration with the precision of fp32, which the text log does not have."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("lm loss")}


def _describe_machine(devices: Devices) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    machine = f"{devices.num_gpus} GPUs" if devices.num_gpus else f"{devices.num_cores} cores, {processor}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return f"{machine} ({packages})"
