"""The runs of a suite: one training each, with the settings that each run alone has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from maskmoe.comparison.suite import Suite, Variant
from maskmoe.launch.model_file import Flags

Kind = Literal["check", "tuning", "whole"]


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
    kind: Kind

    @property
    def name(self) -> str:
        """Path of the run's folder, relative to the folder of the comparison."""
        if self.kind == "check":
            return f"checks/{self.variant.name}"
        if self.kind == "tuning":
            return f"tuning/{self.variant.name}.lr-{self.learning_rate}"
        return f"runs/{self.variant.name}.seed-{self.seed}"

    @property
    def is_analyzed(self) -> bool:
        """Whether the trained model is evaluated. A limit need only reproduce the losses of another run."""
        return self.kind == "whole" and self.variant.role != "limit"


def check_runs(suite: Suite) -> tuple[Run, ...]:
    """Return one check for each variant, except for the variants of the grid, which differ only in their masks."""
    rate = suite.learning_rates[0]
    variants = (*suite.of_role("main"), *suite.of_role("limit"))
    return tuple(Run(variant, variant.seeds[0], rate, "check") for variant in variants)


def tuning_runs(suite: Suite) -> tuple[Run, ...]:
    """Return the runs that try learning rates; none if there is only one learning rate."""
    if len(suite.learning_rates) == 1:
        return ()
    tuned = [variant for variant in suite.variants if variant.is_tuned]
    return tuple(Run(variant, variant.seeds[0], rate, "tuning") for variant in tuned for rate in suite.learning_rates)


def choose_learning_rates(suite: Suite, losses: Mapping[str, float | None]) -> dict[str, str]:
    """Return the learning rate of every variant: the rate with the smallest held-out loss.

    Args:
        suite: the suite.
        losses: held-out loss at the end of each tuning run by the run's name; None if training diverged.
    """
    best = {}
    for variant in suite.variants:
        if variant.is_tuned:
            of_rates = {rate: losses.get(Run(variant, 0, rate, "tuning").name) for rate in suite.learning_rates}
            known = {rate: math.inf if loss is None else loss for rate, loss in of_rates.items()}
            best[variant.name] = min(known, key=known.__getitem__)
    return {variant.name: best[variant.tuned_as] for variant in suite.variants}


def whole_runs(suite: Suite, learning_rates: Mapping[str, str]) -> tuple[Run, ...]:
    """Return all runs that are compared, in the order in which the runs are trained.

    First come the main variants with the most seeds and the limits, then the other main variants, then the grid. Each
    group goes seed by seed, so that all variants of the group have one run before any variant has two.
    """
    main = suite.of_role("main")
    most_seeds = max(len(variant.seeds) for variant in main)
    core = [variant for variant in main if len(variant.seeds) == most_seeds]
    others = [variant for variant in main if len(variant.seeds) < most_seeds]
    runs: list[Run] = []
    for variants in ([*core, *suite.of_role("limit")], others, suite.of_role("grid")):
        seeds = dict.fromkeys(seed for variant in variants for seed in variant.seeds)
        runs += [
            Run(variant, seed, learning_rates[variant.name], "whole")
            for seed in seeds
            for variant in variants
            if seed in variant.seeds
        ]
    return tuple(runs)


def checkpoint_iterations(suite: Suite, run: Run) -> list[int]:
    """Return the iterations at which a run saves, up to its last. An interruption may add further checkpoints."""
    interval, end = _save_interval(suite, run), _train_iterations(suite, run)
    last = min(run.variant.until or end, end)
    return [*range(interval, last, interval), last]


def _train_iterations(suite: Suite, run: Run) -> int:
    """Return the length of the learning rate's schedule. A limit may stop before the end of the schedule."""
    return suite.tuning_iterations if run.kind == "tuning" else int(run.variant.flags["train-iters"][0])


def _save_interval(suite: Suite, run: Run) -> int:
    return max(1, _train_iterations(suite, run) // suite.checkpoints)


def training_flags(suite: Suite, run: Run) -> Flags:
    """Return the variant's flags of training together with the run's own flags, without the flags of the data."""
    flags = dict(run.variant.flags)
    flags.pop("keep-last-checkpoints", None)
    flags |= {
        "train-iters": (str(_train_iterations(suite, run)),),
        "lr": (run.learning_rate,),
        "min-lr": (f"{suite.min_share * float(run.learning_rate):.6g}",),
        "seed": (str(run.seed),),
        "save-interval": (str(_save_interval(suite, run)),),
    }
    if run.kind == "tuning":
        flags["keep-last-checkpoints"] = ("1",)
    if run.variant.until is not None:
        flags["exit-interval"] = (str(run.variant.until),)
    return flags
