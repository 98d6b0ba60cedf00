"""Recommends the interval between two saves, from the time of a save and of a step and from the rate of failures.

A failure loses the steps since the last save, half an interval on average. With a save of C seconds and a failure every
M seconds, an interval of T seconds costs the share C / T + T / 2M of the time. The share is smallest, √(2C / M), at
Young's and Daly's T = √(2CM). The time until the ranks train again is the same for all intervals and left out.
"""

import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Self

from maskmoe.check.assumed_cluster import RANKS_PER_NODE, AssumedCluster, assumed_cluster
from maskmoe.check.cost import TrainingCost
from maskmoe.check.memory import bytes_of_parameter
from maskmoe.check.parameters import ModelParameters
from maskmoe.launch.journal import Entry, Fact, Kind, read_journal
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.settings.batch_sizes import training_iterations
from maskmoe.training.settings.layout import Layout

_DAY = 24 * 3600.0
_MOST_SAVES = 100  # the newest, from which times are measured
_GOOD_ENDS = (0, EXIT_REQUEUE)


@dataclass(frozen=True)
class Duration:
    """A time, and how it is known.

    Attributes:
        seconds: the time in seconds.
        source: how the time is known, as a clause.
        is_measured: whether the run itself has measured it.
    """

    seconds: float
    source: str
    is_measured: bool


@dataclass(frozen=True)
class SaveInterval:
    """The interval between two saves that loses the least time.

    Attributes:
        save: the time for which training stands still for a save.
        step: the time of a training step.
        cluster: the rate of failures, which is assumed.
        shortest_seconds: the time that writing takes beside training, which an interval must not undercut.
        last_iteration: the number of iterations of the run; 0 if it is unknown.
        given: the `--save-interval` of the command line in iterations; None without.
        failures: the number of failures that the run has recorded.
        days: the days since the first start of the run.
    """

    save: Duration
    step: Duration
    cluster: AssumedCluster
    shortest_seconds: float = 0.0
    last_iteration: int = 0
    given: int | None = None
    failures: int = 0
    days: float = 0.0

    @property
    def _mtbf_seconds(self) -> float:
        return self.cluster.mtbf_days * _DAY

    @property
    def best_seconds(self) -> float:
        """Return the interval in seconds that loses the least time, however long the run is."""
        return max(math.sqrt(2 * self.save.seconds * self._mtbf_seconds), self.shortest_seconds)

    @property
    def iterations(self) -> int:
        """Return the recommended interval in iterations, at most the length of the run."""
        iterations = max(1, round(self.best_seconds / self.step.seconds))
        return min(iterations, self.last_iteration or iterations)

    @property
    def minutes(self) -> float:
        """Return the recommended interval in minutes."""
        return self.iterations * self.step.seconds / 60

    def lost_share(self, iterations: int) -> float:
        """Return the share of the time that saves and failures cost with an interval of `iterations`."""
        seconds = iterations * self.step.seconds
        return self.save.seconds / seconds + seconds / (2 * self._mtbf_seconds)

    @property
    def recommendation(self) -> str:
        """Describe the recommended interval."""
        if self.iterations == self.last_iteration:
            return (
                f"one save at the end is enough: the run takes {_digits(self.minutes)} minutes, and failures and saves "
                f"are balanced by a save every {_digits(self.best_seconds / 60)} minutes"
            )
        share = _percent(self.lost_share(self.iterations))
        return (
            f"--save-interval {self.iterations} recommended, {_digits(self.minutes)} minutes: saves and failures then "
            f"cost {share} of the time"
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """Say from which times and failures the recommendation follows, in lines of a label and a text."""
        cluster = self.cluster
        failures = (
            f"one every {_digits(cluster.mtbf_days)} days: nodes of {RANKS_PER_NODE} ranks, here {cluster.nodes}, fail "
            f"every {_digits(cluster.node_mtbf_days)} days each, which is assumed, not measured"
        )
        if self.failures or self.days > 1:
            failures += f"; this run: {self.failures} in {_digits(self.days)} days"
        lines = [
            f"a save      stops training for {_digits(self.save.seconds)} s: {self.save.source}",
            f"a step      takes {_digits(self.step.seconds)} s: {self.step.source}",
            f"failures    {failures}",
        ]
        if self.given is not None and self.iterations not in (self.given, self.last_iteration):
            lines.append(f"given       --save-interval {self.given} costs {_percent(self.lost_share(self.given))}")
        return tuple(lines)


@dataclass(frozen=True)
class History:
    """Times and failures that the journal of a run records.

    Attributes:
        save: the median time for which training stood still for a save; None if there was none of this kind.
        step: the median time of a step; None if no process has saved twice.
        failures: the number of starts of the run that ended by a failure.
        days: the days between the first entry and the last.
    """

    save: Duration | None = None
    step: Duration | None = None
    failures: int = 0
    days: float = 0.0

    @classmethod
    def of(cls, entries: Sequence[Entry], is_asynchronous: bool) -> Self:
        """Return the history in the entries of a journal.

        Args:
            entries: the entries of a journal in the order of their times.
            is_asynchronous: which saves count. Among them, persistent checkpoints count if there are some.
        """
        days = (entries[-1].time - entries[0].time) / _DAY if entries else 0.0
        return cls(_save_time(entries, is_asynchronous), _step_time(entries), _count_failures(entries), days)


def recommend_save_interval(
    args: Namespace, layout: Layout, model: ModelParameters, cost: TrainingCost, run_folder: Path | None
) -> SaveInterval | None:
    """Recommend an interval, from what the run has measured or else from estimates.

    Args:
        args: arguments that Megatron has validated.
        layout: the layout of the run.
        model: the parameters of the model.
        cost: the operations of the run.
        run_folder: the run folder; None if there is none.

    Returns:
        The recommendation; None if a step has no operations from which its time could be estimated.
    """
    history = History.of(read_journal(run_folder) if run_folder is not None else [], bool(args.async_save))
    cluster = assumed_cluster(args, layout.ranks)
    size = _checkpoint_bytes(args, model)
    copying, writing = cluster.seconds_of_copying(size), cluster.seconds_of_writing(size)
    save = history.save or Duration(
        copying if args.async_save else writing, cluster.describe_save(size, args.async_save), is_measured=False
    )
    flops = (cost.flops_per_token + cost.recomputed_flops_per_token) * layout.tokens_per_step
    step = history.step or Duration(
        cost.gpu.hours(flops) * 3600 / layout.ranks, f"from the cost with {cost.gpu}", is_measured=False
    )
    if not step.seconds:
        return None
    return SaveInterval(
        save,
        step,
        cluster,
        shortest_seconds=writing if args.async_save and not save.is_measured else 0.0,
        last_iteration=training_iterations(args),
        given=args.save_interval,
        failures=history.failures,
        days=history.days,
    )


def _checkpoint_bytes(args: Namespace, model: ModelParameters) -> int:
    """Return the bytes of a checkpoint: weights, and the state of the optimizer unless it is not saved."""
    weight, _, optimizer = bytes_of_parameter(args)
    return model.whole.num_parameters * (weight + (0 if args.no_save_optim else optimizer))


def _saves(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries of saves whose facts can be read."""
    return [entry for entry in entries if entry.kind is Kind.SAVED and _is_time(entry.facts.get("seconds"))]


def _is_time(fact: Fact | None) -> bool:
    return isinstance(fact, float) and math.isfinite(fact) and fact > 0


def _save_time(entries: Sequence[Entry], is_asynchronous: bool) -> Duration | None:
    saves = [entry for entry in _saves(entries) if entry.facts.get("is_asynchronous") == is_asynchronous]
    persistent = [entry for entry in saves if not entry.facts.get("is_local")]
    newest = (persistent or saves)[-_MOST_SAVES:]
    if not newest:
        return None
    kind = "asynchronous saves" if is_asynchronous else "saves"
    seconds = median(float(entry.facts["seconds"]) for entry in newest)
    return Duration(seconds, f"measured, the median of {len(newest)} {kind}", is_measured=True)


def _step_time(entries: Sequence[Entry]) -> Duration | None:
    """Return the time of a step between two saves of one start, without the time of the saves."""
    times = []
    for start in _starts(entries):
        for before, after in pairwise(_saves(start)):
            steps = (after.iteration or 0) - (before.iteration or 0)
            seconds = after.time - before.time - float(after.facts["seconds"])
            if before.host == after.host and steps > 0 and seconds > 0:
                times.append(seconds / steps)
    newest = times[-_MOST_SAVES:]
    if not newest:
        return None
    source = f"measured, the median between {len(newest)} pairs of saves, evaluation included"
    return Duration(median(newest), source, is_measured=True)


def _count_failures(entries: Sequence[Entry]) -> int:
    """Return the number of starts that ended by a failure, which the launchers of several nodes may have recorded."""
    ends = (
        [entry.facts.get("exit_code", 0) for entry in start if entry.kind is Kind.ENDED] for start in _starts(entries)
    )
    return sum(any(code not in _GOOD_ENDS for code in codes) for codes in ends)


def _starts(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Divide the entries among the starts of the run; the launchers of several nodes record the same start."""
    starts: list[list[Entry]] = [[]]
    for entry in entries:
        if entry.kind is Kind.STARTED and any(other.kind is not Kind.STARTED for other in starts[-1]):
            starts.append([])
        starts[-1].append(entry)
    return starts


def _digits(number: float) -> str:
    """Write a number with three digits, or in full if it has more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
