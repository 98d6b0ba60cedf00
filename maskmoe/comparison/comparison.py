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
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.training_log import TrainingHistory


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

    @property
    def report_folder(self) -> Path:
        """Folder of the report."""
        return self.folder / "report"

    def plan(self, run: Run) -> RunPlan:
        """Return the stages of a run."""
        return RunPlan(self.suite, run, self.data, self.folder / run.name, self.devices)

    def is_finished(self, run: Run) -> bool:
        """Return whether all stages of a run are finished and nothing has changed since."""
        plan = self.plan(run)
        if not (plan.files.record.exists() and plan.is_prepared):
            return False
        record = RunRecord(plan.files.record)
        return all(record.is_finished(make_stage()) for make_stage in plan.stages)

    def unfinished(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """Return the unfinished runs among the given ones, in order."""
        return tuple(run for run in runs if not self.is_finished(run))

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

    def parameters(self) -> dict[str, Parameters]:
        """Return the numbers of parameters of all checked main variants by name."""
        runs = [run for run in check_runs(self.suite) if run.variant.role == "main"]
        found = {run.variant.name: Parameters.from_check(read_log(self.plan(run).files.log("check"))) for run in runs}
        return {name: parameters for name, parameters in found.items() if parameters is not None}

    def whole_runs(self) -> tuple[Run, ...]:
        """Return all runs that are compared. The tuning runs must be finished."""
        return whole_runs(self.suite, choose_learning_rates(self.suite, self.tuning_losses()))

    def tuning_losses(self) -> dict[str, float | None]:
        """Return the last held-out loss of every tuning run by its name; None if the loss is not a finite number."""
        return {run.name: self._last_held_out_loss(run) for run in tuning_runs(self.suite)}

    def find_run(self, name: str) -> Run:
        """Return the run with the name.

        Raises:
            UserError: no run has the name.
        """
        for run in self.known_runs():
            if run.name == name:
                return run
        raise UserError(f"the suite has no run {name}; --list shows all runs")

    def history(self, run: Run) -> TrainingHistory:
        """Return the losses that a run has logged so far."""
        return self.plan(run).history()

    def _last_held_out_loss(self, run: Run) -> float | None:
        validations = self.history(run).validations
        loss = validations[max(validations)].loss if validations else math.nan
        return loss if math.isfinite(loss) else None
