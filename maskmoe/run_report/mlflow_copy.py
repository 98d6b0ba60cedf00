"""Copies what a run has logged from TensorBoard's event files to MLflow."""

import re
from collections import deque
from itertools import batched
from pathlib import Path
from typing import Any

from maskmoe.run_report.events import EventFolder, Scalar
from maskmoe.run_report.facts import OWN_TEXT
from maskmoe.run_report.run_id import find_or_make_id

RUN_ID = "mlflow_run_id"
"""The file of the run folder with the id of the run at MLflow."""

# MLflow's limits of one request and of one value.
_MOST_METRICS = 1000
_MOST_PARAMETERS = 100
_MOST_CHARACTERS = 6000
_LOSS = "lm loss"


class MlflowCopy:
    """The MLflow run that belongs to a run folder; it is made when there is none yet.

    Args:
        client: an `mlflow.MlflowClient`.
        run_folder: the run folder, which keeps the id of the MLflow run.
        events: the event files.
        experiment: name of the MLflow experiment, which is made if it does not exist.
    """

    def __init__(self, client: Any, run_folder: Path, events: EventFolder, experiment: str) -> None:
        self._client, self._events = client, events
        self._unsent: deque[Scalar] = deque()
        self._texts: dict[str, str] = {}
        self._newest_step: dict[str, int] = {}  # by name of the metric
        self.run_id = self._find_or_make_run(run_folder, experiment)

    def update(self) -> int:
        """Send what is new, and return the number of values. After an error, the next call sends the rest.

        An iteration that MLflow has already is not sent again, even if a resumed run has repeated the iteration.
        """
        from mlflow.entities import Metric  # pyrefly: ignore[missing-import]  # users who want MLflow install it

        for _, event in self._events.read_new():
            if isinstance(event, Scalar):
                self._unsent.append(event)
            else:
                self._texts[_allowed(event.tag.removeprefix(OWN_TEXT))] = event.text[:_MOST_CHARACTERS]
        self._send_parameters()
        number = 0
        while self._unsent:
            scalars = [self._unsent[index] for index in range(min(_MOST_METRICS, len(self._unsent)))]
            newest_step, metrics = {}, []
            for scalar in scalars:
                name = _allowed(scalar.tag)
                if scalar.step > newest_step.setdefault(name, self._step_of(name)):
                    newest_step[name] = scalar.step
                    metrics.append(Metric(name, scalar.value, int(scalar.seconds * 1000), scalar.step))
            self._client.log_batch(self.run_id, metrics=metrics)
            self._newest_step |= newest_step
            for _ in scalars:
                self._unsent.popleft()
            number += len(metrics)
        if str(self._newest_step.get(_LOSS)) == self._texts.get("train_iters"):
            self._client.set_terminated(self.run_id)
        return number

    def _send_parameters(self) -> None:
        from mlflow.entities import Param  # pyrefly: ignore[missing-import]

        # MLflow does not let a parameter change, so the values of the first start stay.
        known = self._client.get_run(self.run_id).data.params
        new = [Param(name, text) for name, text in self._texts.items() if name not in known]
        for batch in batched(new, _MOST_PARAMETERS):
            self._client.log_batch(self.run_id, params=list(batch))

    def _step_of(self, name: str) -> int:
        """Return the newest step of a metric that MLflow has; -1 without any."""
        if name not in self._newest_step:
            history = self._client.get_metric_history(self.run_id, name)
            self._newest_step[name] = max((metric.step for metric in history), default=-1)
        return self._newest_step[name]

    def _find_or_make_run(self, run_folder: Path, experiment: str) -> str:
        def make_run() -> str:
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
            return self._client.create_run(experiment_id, run_name=run_folder.resolve().name).info.run_id

        return find_or_make_id(run_folder / RUN_ID, make_run)


def _allowed(name: str) -> str:
    """Return a name in which each character that MLflow refuses is an underscore."""
    return re.sub(r"[^\w\-. /:]", "_", name)
