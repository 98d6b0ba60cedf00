"""The runs of a suite: one training each, with what is decided for it alone."""

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
        variant: what is trained.
        seed: of weights, of the order of the data, and of the mask.
        learning_rate: the largest, as a word.
        kind: `check`: nothing is trained, the settings are only checked. `tuning`: a short run that only helps to
            choose the learning rate. `whole`: what is compared.
    """

    variant: Variant
    seed: int
    learning_rate: str
    kind: Kind

    @property
    def name(self) -> str:
        """Of its folder, in that of the suite."""
        if self.kind == "check":
            return f"checks/{self.variant.name}"
        if self.kind == "tuning":
            return f"tuning/{self.variant.name}.lr-{self.learning_rate}"
        return f"runs/{self.variant.name}.seed-{self.seed}"

    @property
    def is_analyzed(self) -> bool:
        """Whether it is evaluated when it is trained: a whole run that need not just equal another one."""
        return self.kind == "whole" and self.variant.role != "limit"


def check_runs(suite: Suite) -> tuple[Run, ...]:
    """One for each variant, to find what is wrong before any is trained; the grid's differ in their masks only."""
    rate = suite.learning_rates[0]
    variants = (*suite.of_role("main"), *suite.of_role("limit"))
    return tuple(Run(variant, variant.seeds[0], rate, "check") for variant in variants)


def tuning_runs(suite: Suite) -> tuple[Run, ...]:
    """The runs by which learning rates are chosen, none where there is nothing to choose."""
    if len(suite.learning_rates) == 1:
        return ()
    tuned = [variant for variant in suite.variants if variant.is_tuned]
    return tuple(Run(variant, variant.seeds[0], rate, "tuning") for variant in tuned for rate in suite.learning_rates)


def choose_learning_rates(suite: Suite, losses: Mapping[str, float | None]) -> dict[str, str]:
    """The learning rate of every variant: that of the smallest held-out loss.

    Args:
        suite: the suite.
        losses: held-out loss at the end of tuning runs, by their names; None where training diverged.
    """
    best = {}
    for variant in suite.variants:
        if variant.is_tuned:
            rates = {rate: losses.get(Run(variant, 0, rate, "tuning").name) for rate in suite.learning_rates}
            best[variant.name] = min(rates, key=lambda rate: math.inf if rates[rate] is None else rates[rate])
    return {variant.name: best[variant.tuned_as] for variant in suite.variants}


def whole_runs(suite: Suite, learning_rates: Mapping[str, str]) -> tuple[Run, ...]:
    """All other runs: first of the main variants that have the most seeds, with the limits; of all others; the grid's.

    Each group goes seed by seed, so that all its variants have one run before any has two.
    """
    main = suite.of_role("main")
    most_seeds = max(len(variant.seeds) for variant in main)
    core = [variant for variant in main if len(variant.seeds) == most_seeds]
    others = [variant for variant in main if len(variant.seeds) < most_seeds]
    runs = []
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
    """At which a run saves, the last of them at its end; an interruption may add others."""
    interval, end = _save_interval(suite, run), _train_iterations(suite, run)
    last = min(run.variant.until or end, end)
    return [*range(interval, last, interval), last]


def _train_iterations(suite: Suite, run: Run) -> int:
    """The length of the schedule, which a limit need not follow to its end."""
    return suite.tuning_iterations if run.kind == "tuning" else int(run.variant.flags["train-iters"][0])


def _save_interval(suite: Suite, run: Run) -> int:
    return max(1, _train_iterations(suite, run) // suite.checkpoints)


def training_flags(suite: Suite, run: Run) -> Flags:
    """Flags of training that depend on the run; those of the variant and the data come on top."""
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
