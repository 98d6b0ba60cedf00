"""Which runs of a suite a command concerns."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from maskmoe.comparison.runs import Run, choose_learning_rates, tuning_runs, whole_runs
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Shell patterns and seeds that choose runs; all runs by default.

    Attributes:
        patterns: shell patterns of names of runs or variants; if empty, all runs.
        seeds: seeds of whole runs; if empty, all seeds. Tuning runs have one seed and are chosen by patterns alone.
    """

    patterns: Sequence[str] = ()
    seeds: Sequence[int] = ()

    def tuning_runs(self, suite: Suite) -> tuple[Run, ...]:
        """Return the tuning runs that the patterns match, or on which a chosen whole run depends, in order."""
        needed = {run.variant.tuned_as for run in self.whole_runs(suite)}
        return tuple(run for run in tuning_runs(suite) if run.variant.name in needed or self._matches(run))

    def names(self, run: Run) -> bool:
        """Return whether a pattern matches the run's own name, and not only the name of its variant."""
        return self._has_pattern_of(run.name)

    def whole_runs(self, suite: Suite) -> tuple[Run, ...]:
        """Return the chosen whole runs, in order. Their learning rates have no meaning."""
        runs = whole_runs(suite, choose_learning_rates(suite, {}))
        return tuple(run for run in runs if self._matches(run) and (not self.seeds or run.seed in self.seeds))

    def check(self, suite: Suite) -> None:
        """Refuse a pattern or a seed that chooses nothing.

        Raises:
            UserError: a pattern matches no run, or no run has one of the seeds.
        """
        runs = whole_runs(suite, choose_learning_rates(suite, {}))
        for pattern in self.patterns:
            if not any(Selection((pattern,))._matches(run) for run in (*runs, *tuning_runs(suite))):
                raise UserError(f"--only {pattern} matches no run and no variant of the suite {suite.name}")
        for seed in self.seeds:
            if not any(run.seed == seed for run in runs):
                raise UserError(f"--seeds {seed}: no run of the suite {suite.name} has this seed")
        if not (self.whole_runs(suite) or self.tuning_runs(suite)):
            raise UserError(f"no run of the suite {suite.name} has both a name of --only and a seed of --seeds")

    def _matches(self, run: Run) -> bool:
        return not self.patterns or self.names(run) or self._has_pattern_of(run.variant.name)

    def _has_pattern_of(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)
