"""What the runs of a comparison have shown: read from their files, kept as JSON, compared seed by seed."""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.runs import Run, choose_learning_rates, tuning_runs
from maskmoe.comparison.suite import Role, Variant
from maskmoe.json_files import read_json
from maskmoe.workflow.record import RunRecord

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """Losses by iteration, in nats per token."""

    iterations: list[int]
    losses: list[float]


@dataclass(frozen=True)
class RoutingHistory:
    """How the checkpoints of a run route a fixed text, from what tools/analyze_routing.py has written.

    What has no value, such as the entropy where no token has a choice, is None.

    Attributes:
        layers: numbers of those with experts.
        iterations: of the checkpoints.
        entropy: [checkpoints, layers], nats, of tokens with a choice.
        fluctuation: [checkpoints - 1, layers], share of the experts of all tokens that changed since the one before.
        routable_fluctuation: the same of tokens with a choice.
        single_expert_token_share: [layers], tokens without a choice.
        id_information: [layers], what the expert tells of the id at the last checkpoint, in nats.
        distinct_experts: by band, [layers], experts that an id's occurrences spread over, at the last checkpoint.
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
        """From routing.json. Raises UserError if it cannot be read."""
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
        """Whether a router has one."""
        return min(self.single_expert_token_share) < 1


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        variant: name of what was trained.
        seed: of the run.
        seconds: that training took.
        training, validation: losses on the way; of all tokens, and of part of the held-out text.
        loss: of all the held-out text at the end, in nats per token.
        bands: the same of its tokens by the frequency of their ids: `name`, `share`, `loss`.
        load: for each layer with experts, the tokens of held-out text that each expert got.
        routing: of each checkpoint; None for a model without experts.
    """

    variant: str
    seed: int
    seconds: float
    training: Curve
    validation: Curve
    loss: float
    bands: list[dict[str, Any]]
    load: list[list[int]]
    routing: RoutingHistory | None


@dataclass(frozen=True)
class VariantResult:
    """A variant, and how it was made.

    Attributes:
        name, title, role: as in `Variant`.
        mask: flags of tools/build_routing_mask.py; None for a model without experts.
        parameters: None where only the mask differs from another variant's.
        learning_rate: of its runs.
        tuning: held-out loss by learning rate, of a variant that was tuned itself.
        tokens: that each run was trained on.
    """

    name: str
    title: str
    role: Role
    mask: dict[str, list[str]] | None
    parameters: Parameters | None
    learning_rate: str
    tuning: dict[str, float | None]
    tokens: int

    def number(self, flag: str) -> float | None:
        """The value of a flag of its mask, if it has one."""
        return float(self.mask[flag][0]) if self.mask and flag in self.mask else None


@dataclass(frozen=True)
class LimitResult:
    """Whether a variant reproduces another one.

    Attributes:
        title: of the variant.
        equals: name of the other.
        seed: of both runs.
        iterations: that were compared.
        num_equal: those of them in which the losses, in fp32, are the same to the last bit.
    """

    title: str
    equals: str
    seed: int
    iterations: int
    num_equal: int


@dataclass(frozen=True)
class Results:
    """All that a report shows.

    Attributes:
        title: of the suite.
        command: that made it.
        machine: where, and with which versions of torch and Megatron-Core.
        baselines: names of the variants that the others are compared to.
        variants: in order, those with finished runs.
        runs: the finished runs.
        limits: the finished limits.
        unfinished: names of runs that are missing.
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
        """The variants of one role, in order."""
        return [variant for variant in self.variants if variant.role == role]

    def variant(self, name: str) -> VariantResult | None:
        """The variant of a name, if it has a finished run."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def runs_of(self, name: str) -> list[RunResult]:
        """The runs of a variant."""
        return [run for run in self.runs if run.variant == name]

    def band_names(self) -> list[str]:
        """Names of the frequency bands."""
        return [band["name"] for band in self.runs[0].bands] if self.runs else []

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` has written. Raises UserError if it cannot be read."""
        content = read_json(path)
        variants = [_variant_result(values) for values in content.pop("variants")]
        runs = [_run_result(values) for values in content.pop("runs")]
        limits = [LimitResult(**values) for values in content.pop("limits")]
        return cls(variants=variants, runs=runs, limits=limits, **content)


def _variant_result(values: dict[str, Any]) -> VariantResult:
    parameters = values.pop("parameters")
    return VariantResult(**values, parameters=None if parameters is None else Parameters(**parameters))


def _run_result(values: dict[str, Any]) -> RunResult:
    curves = {name: Curve(**values.pop(name)) for name in ("training", "validation")}
    routing = values.pop("routing")
    return RunResult(**values, **curves, routing=None if routing is None else RoutingHistory(**routing))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        standard_error: of the mean; nan if there is one value only.
        num: values.
    """

    mean: float
    standard_error: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of one value or more."""
        error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), float(error), len(values))

    @property
    def is_resolved(self) -> bool:
        """Whether it differs from 0 with 95 % confidence, by Student's t of so few values."""
        from scipy.special import stdtrit

        if self.num < 2:
            return False
        quantile = stdtrit(self.num - 1, (1 + _CONFIDENCE) / 2)
        return abs(self.mean) > quantile * self.standard_error


def paired_difference(
    results: Results, name: str, baseline: str, value: Callable[[RunResult], float]
) -> Estimate | None:
    """How a variant differs from another over the seeds that both have; None if there is no such seed.

    Both runs of a pair see the same data in the same order and start from the same weights where they have the same, so
    most of what differs from seed to seed cancels.

    Args:
        results: all of them.
        name: the variant.
        baseline: what it is compared to.
        value: of a run.
    """
    of_baseline = {run.seed: value(run) for run in results.runs_of(baseline)}
    pairs = [value(run) - of_baseline[run.seed] for run in results.runs_of(name) if run.seed in of_baseline]
    return Estimate.of(pairs) if pairs else None


def collect_results(comparison: Comparison, command: str) -> Results:
    """Read what the finished runs of a comparison have left.

    Args:
        comparison: the comparison, as far as it is.
        command: that the report shall name.
    """
    suite = comparison.suite
    losses = comparison.tuning_losses()
    rates = choose_learning_rates(suite, losses)
    parameters = comparison.parameters()
    runs, limits, unfinished = [], [], []
    for run in comparison.whole_runs():
        if not comparison.is_finished(run):
            unfinished.append(run.name)
        elif run.variant.role == "limit":
            limits.append(_compare_limit(comparison, run))
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
            tokens=_tokens(variant),
        )
        for variant in suite.variants
        if variant.name in found
    ]
    machine = _describe_machine(comparison)
    return Results(suite.title, command, machine, list(suite.baselines), variants, runs, limits, unfinished)


def _tokens(variant: Variant) -> int:
    number = {name: int(variant.flags[name][0]) for name in ("train-iters", "global-batch-size", "seq-length")}
    return math.prod(number.values())


def _read_run(comparison: Comparison, run: Run) -> RunResult:
    plan = comparison.plan(run)
    evaluation = read_json(plan.files.evaluation)
    history = comparison.history(run)
    return RunResult(
        variant=run.variant.name,
        seed=run.seed,
        seconds=RunRecord(plan.files.record)["train"].seconds,
        training=_curve(history.iterations),
        validation=_curve(history.validations),
        loss=evaluation["loss"],
        bands=[{name: band[name] for name in ("name", "share", "loss")} for band in evaluation["bands"]],
        load=[load["tokens_per_expert"] for load in evaluation["expert_load"]],
        routing=RoutingHistory.read(plan.files.routing / "routing.json") if run.variant.has_experts else None,
    )


def _curve(records: Mapping[int, Any]) -> Curve:
    points = [(iteration, record.loss) for iteration, record in sorted(records.items()) if record.loss is not None]
    return Curve([iteration for iteration, _ in points], [loss for _, loss in points])


def _compare_limit(comparison: Comparison, run: Run) -> LimitResult:
    other = replace(run, variant=comparison.suite[run.variant.equals])
    own, others = (_exact_losses(comparison.plan(each).files.tensorboard) for each in (run, other))
    common = own.keys() & others.keys()
    num_equal = sum(own[iteration] == others[iteration] for iteration in common)
    return LimitResult(run.variant.title, run.variant.equals, run.seed, len(common), num_equal)


def _exact_losses(tensorboard: Path) -> dict[int, float]:
    """Training losses by iteration, as fp32."""
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
