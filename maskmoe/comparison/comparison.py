"""A comparison: a suite in its folder, with the state of its runs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.data import Data
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.runs import Run, check_runs, choose_learning_rates, tuning_runs, whole_runs
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.launch.devices import Devices
from maskmoe.workflow.process import read_log


@dataclass(frozen=True)
class Comparison:
    """A suite whose runs are trained in a folder.

    Attributes:
        suite: the suite.
        folder: folder of all files.
        data: dataset of all runs.
        devices: devices of this machine.
    """

    suite: Suite
    folder: Path
    data: Data
    devices: Devices

    def plan(self, run: Run) -> RunPlan:
        """Return the stages of a run."""
        return RunPlan(self.suite, run, self.data, self.folder / run.name, self.devices)

    def unfinished(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """Return the runs among the given ones of which a stage is unfinished or has changed since, in order."""
        return tuple(run for run in runs if self.plan(run).unfinished)

    def runs_of_next_phase(self) -> tuple[Run, ...]:
        """Return the unfinished runs of the first phase that has any: checks, learning rates, whole runs."""
        for runs in (check_runs(self.suite), tuning_runs(self.suite)):
            if unfinished := self.unfinished(runs):
                return unfinished
        return self.unfinished(self.whole_runs())

    def known_runs(self) -> tuple[Run, ...]:
        """Return all runs that are known by now. Whole runs are known only after all learning rates are chosen."""
        tuning = (*check_runs(self.suite), *tuning_runs(self.suite))
        return tuning if self.unfinished(tuning) else (*tuning, *self.whole_runs())

    def whole_runs(self) -> tuple[Run, ...]:
        """Return all runs that are compared. The tuning runs must be finished."""
        return whole_runs(self.suite, choose_learning_rates(self.suite, self.tuning_losses()))

    def find_run(self, name: str) -> Run:
        """Return the run with the name.

        Raises:
            UserError: no run has the name.
        """
        for run in self.known_runs():
            if run.name == name:
                return run
        raise UserError(f"the suite has no run {name}; --list shows all runs")

    def tuning_losses(self) -> dict[str, float | None]:
        """Return the last held-out loss of every tuning run by its name; None if the loss is not a finite number."""
        losses = {}
        for run in tuning_runs(self.suite):
            validations = self.plan(run).history().validations
            loss = validations[max(validations)].loss if validations else math.nan
            losses[run.name] = loss if math.isfinite(loss) else None
        return losses

    def parameters(self) -> dict[str, Parameters]:
        """Return the numbers of parameters of all checked main variants by name."""
        runs = [run for run in check_runs(self.suite) if run.variant.role == "main"]
        found = {run.variant.name: Parameters.from_check(read_log(self.plan(run).files.log("check"))) for run in runs}
        return {name: parameters for name, parameters in found.items() if parameters}
