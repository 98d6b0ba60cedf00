"""A suite in its folder: which runs there are, and how far they are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from maskmoe.comparison.data import Data
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.plan import DataPlan, RunPlan
from maskmoe.comparison.runs import Run, check_runs, choose_learning_rates, tuning_runs, whole_runs
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.launch.devices import Devices
from maskmoe.workflow.progress import TrainingHistory
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import read_log


@dataclass(frozen=True)
class Comparison:
    """A suite at work in a folder.

    Attributes:
        suite: the suite.
        folder: of all its files.
        data: what all runs are trained on.
        devices: of this machine.
    """

    suite: Suite
    folder: Path
    data: Data
    devices: Devices

    @property
    def data_plan(self) -> DataPlan:
        return DataPlan(self.data, int(self.suite.variants[0].flags["seq-length"][0]))

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    def plan(self, run: Run) -> RunPlan:
        """The stages of a run."""
        return RunPlan(self.suite, run, self.data, self.folder / run.name, self.devices)

    def is_finished(self, run: Run) -> bool:
        """Whether all stages of a run are, and nothing has changed since."""
        plan = self.plan(run)
        if not (plan.files.record.exists() and plan.is_prepared):
            return False
        record = RunRecord(plan.files.record)
        return all(record.is_finished(make_stage()) for make_stage in plan.stages)

    def unfinished(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """Those of the runs that are not finished, in order."""
        return tuple(run for run in runs if not self.is_finished(run))

    def runs_of_next_phase(self) -> tuple[Run, ...]:
        """The runs that can be taken up now: checks, then those for learning rates, then all others."""
        for runs in (check_runs(self.suite), tuning_runs(self.suite)):
            if unfinished := self.unfinished(runs):
                return unfinished
        return self.unfinished(self.whole_runs())

    def known_runs(self) -> tuple[Run, ...]:
        """All runs, as far as learning rates are chosen: those of tuning come first."""
        tuning = (*check_runs(self.suite), *tuning_runs(self.suite))
        return tuning if self.unfinished(tuning) else (*tuning, *self.whole_runs())

    def parameters(self) -> dict[str, Parameters]:
        """Of the main variants, by name, as far as they are checked."""
        runs = [run for run in check_runs(self.suite) if run.variant.role == "main"]
        found = {run.variant.name: Parameters.from_check(read_log(self.plan(run).files.log("check"))) for run in runs}
        return {name: parameters for name, parameters in found.items() if parameters is not None}

    def whole_runs(self) -> tuple[Run, ...]:
        """All runs that are compared; learning rates must have been chosen."""
        return whole_runs(self.suite, choose_learning_rates(self.suite, self.tuning_losses()))

    def tuning_losses(self) -> dict[str, float | None]:
        """The last held-out loss of every tuning run, by its name; None where it is not a number."""
        return {run.name: self._last_validation(run) for run in tuning_runs(self.suite)}

    def find_run(self, name: str) -> Run:
        """The run of a name.

        Raises:
            UserError: there is none.
        """
        for run in self.known_runs():
            if run.name == name:
                return run
        raise UserError(f"the suite has no run {name}; --list shows all")

    def history(self, run: Run) -> TrainingHistory:
        """The losses of a run, as far as it is."""
        return self.plan(run).history()

    def _last_validation(self, run: Run) -> float | None:
        validations = self.history(run).validations
        loss = validations[max(validations)].loss if validations else math.nan
        return loss if math.isfinite(loss) else None
