"""The runs of a suite: one training each, with the settings that each run alone has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from maskmoe.comparison.suite import Suite, Variant
from maskmoe.launch.model_file import Flags


@dataclass(frozen=True)
class Run:
    """One training of a variant.

    Attributes:
        variant: the variant to be trained.
        seed: seed of the weights, of the order of the data, and of the mask.
        learning_rate: the largest learning rate, as a word.
        kind: `check`: the settings are checked and nothing is trained. `tuning`: a short run that only helps to choose
            the learning rate. `whole`: a run that is compared.
    """

    variant: Variant
    seed: int
    learning_rate: str
    kind: Literal["check", "tuning", "whole"]

    @property
    def name(self) -> str:
        """Path of the run's folder, relative to the folder of the comparison."""
        name = self.variant.name
        if self.kind == "whole":
            return f"runs/{name}.seed-{self.seed}"
        return f"checks/{name}" if self.kind == "check" else f"tuning/{name}.lr-{self.learning_rate}"

    @property
    def is_analyzed(self) -> bool:
        """Whether the trained model is evaluated. A limit need only reproduce the losses of another run."""
        return self.kind == "whole" and self.variant.role != "limit"


def check_runs(suite: Suite) -> tuple[Run, ...]:
    """Return one check for each variant, except for the variants of the grid, which differ only in their masks."""
    rate = suite.learning_rates.values[0]
    variants = (*suite.of_role("main"), *suite.of_role("limit"), *suite.of_role("curve"))
    return tuple(Run(variant, variant.seeds[0], rate, "check") for variant in variants)


def tuning_runs(suite: Suite) -> tuple[Run, ...]:
    """Return all runs that may be needed to choose the learning rates; none if there is only one learning rate.

    `next_tuning_runs` says which of them are needed.
    """
    rates = suite.learning_rates.values
    tuned = [variant for variant in suite.variants.values() if variant.is_tuned and len(rates) > 1]
    return tuple(Run(variant, variant.seeds[0], rate, "tuning") for variant in tuned for rate in rates)


def next_rates(rates: Sequence[str], losses: Mapping[str, float | None]) -> tuple[str, ...]:
    """Return the learning rates of a variant that have to be tried before its best rate is known.

    The search assumes that the loss over the rates has one minimum. It starts with the two rates in the middle, and
    ends when the rates beside the best one have been tried, too.

    Args:
        rates: all learning rates of a suite, ascending.
        losses: held-out loss by learning rate that was tried; None if training diverged.

    Returns:
        the rates that can be tried side by side now; none if the best rate is known.
    """
    if len(rates) == 1:
        return ()
    known = {number: _comparable(losses[rate]) for number, rate in enumerate(rates) if rate in losses}
    middle = (len(rates) - 1) // 2
    best = min(known, key=known.__getitem__, default=None)
    wanted = (middle, middle + 1) if best is None else (best - 1, best + 1)
    return tuple(rates[number] for number in wanted if 0 <= number < len(rates) and number not in known)


def next_tuning_runs(suite: Suite, losses: Mapping[str, float | None]) -> tuple[Run, ...]:
    """Return the tuning runs that have to be finished next; none if the learning rates of all variants are known.

    Args:
        suite: the suite.
        losses: held-out loss at the end of each finished tuning run by the run's name; None if training diverged.
    """
    runs, rates = tuning_runs(suite), suite.learning_rates.values
    tried = {name: dict[str, float | None]() for name in suite.variants}
    for run in runs:
        if run.name in losses:
            tried[run.variant.name][run.learning_rate] = losses[run.name]
    return tuple(run for run in runs if run.learning_rate in next_rates(rates, tried[run.variant.name]))


def choose_learning_rates(suite: Suite, losses: Mapping[str, float | None]) -> dict[str, str]:
    """Return the learning rate of every variant: the rate with the smallest held-out loss, times the variant's factor.

    Args:
        suite: the suite.
        losses: held-out loss at the end of each finished tuning run by the run's name; None if training diverged.
    """
    chosen = {}
    for variant in suite.variants.values():
        tuned = suite.variants[variant.tuned_as]
        of_rates = {rate: losses.get(Run(tuned, 0, rate, "tuning").name) for rate in suite.learning_rates.values}
        known = {rate: _comparable(loss) for rate, loss in of_rates.items()}
        chosen[variant.name] = variant.learning_rate(min(known, key=known.__getitem__))
    return chosen


def _comparable(loss: float | None) -> float:
    """Return a loss, or infinity if training diverged or was not tried."""
    return math.inf if loss is None else loss


def whole_runs(suite: Suite, learning_rates: Mapping[str, str]) -> tuple[Run, ...]:
    """Return all runs that are compared, in the order in which the runs are trained.

    First come the main variants with the most seeds and the limits, then the other main variants, then the grid, then
    the curves. Each group goes seed by seed, so that all variants of the group have one run before any variant has two.
    """
    most_seeds = max(len(variant.seeds) for variant in suite.of_role("main"))

    def group(variant: Variant) -> int:
        if variant.role == "main" and len(variant.seeds) < most_seeds:
            return 1
        return {"grid": 2, "curve": 3}.get(variant.role, 0)

    runs = [
        Run(variant, seed, learning_rates[variant.name], "whole")
        for variant in suite.variants.values()
        for seed in variant.seeds
    ]
    return tuple(sorted(runs, key=lambda run: (group(run.variant), run.seed)))


def _train_iterations(suite: Suite, run: Run) -> int:
    """Return the length of the learning rate's schedule. A limit may stop before the end of the schedule."""
    return suite.learning_rates.iterations if run.kind == "tuning" else int(run.variant.flags["train-iters"][0])


def checkpoint_iterations(suite: Suite, run: Run) -> list[int]:
    """Return the iterations at which a run saves, up to its last. An interruption may add further checkpoints."""
    end = _train_iterations(suite, run)
    interval, last = max(1, end // suite.checkpoints), min(run.variant.until or end, end)
    return [*range(interval, last, interval), last]


def training_flags(suite: Suite, run: Run) -> Flags:
    """Return the variant's flags of training together with the run's own flags, without the flags of the data."""
    end = _train_iterations(suite, run)
    flags = {flag: words for flag, words in run.variant.flags.items() if flag != "keep-last-checkpoints"}
    flags |= {
        "train-iters": (str(end),),
        "lr": (run.learning_rate,),
        "min-lr": (f"{float(suite.learning_rates.min_share) * float(run.learning_rate):.6g}",),
        "seed": (str(run.seed),),
        "save-interval": (str(max(1, end // suite.checkpoints)),),
    }
    if run.kind == "tuning":
        flags["keep-last-checkpoints"] = ("1",)
    if run.variant.until is not None:
        flags["exit-interval"] = (str(run.variant.until),)
    return flags
