"""Records how long a step takes, and says so when a run continues on another number of ranks."""

import itertools
import statistics
import time
from pathlib import Path

from maskmoe.files.wording import counted
from maskmoe.launch.journal import Entry, Journal, Kind, read_journal
from maskmoe.megatron_compat.globals import get_args
from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.console import console

_SKIPPED_STEPS = 2  # in which memory is allocated and kernels are chosen
_STEPS = 8


class StepTime(Callback):
    """Measures the first steps of a start on the first rank.

    Args:
        journal_folder: The run folder, whose journal gets the measured time; None on all ranks but the first.
        ranks: The number of ranks.
    """

    def __init__(self, journal_folder: Path | None, ranks: int) -> None:
        self._folder = journal_folder
        self._ranks = ranks
        self._iteration: int | None = None
        self._begins: list[float] = []

    def before_micro_batch(self) -> None:
        """Note when an iteration begins. After a few iterations, record their median time."""
        if self._folder is None or self._iteration == (iteration := get_args().curr_iteration):
            return
        self._iteration = iteration
        self._begins.append(time.monotonic())
        if len(self._begins) > _SKIPPED_STEPS + _STEPS:
            steps = (end - begin for begin, end in itertools.pairwise(self._begins[_SKIPPED_STEPS:]))
            self._record(self._folder, statistics.median(steps))
            self._folder = None

    def _record(self, folder: Path, seconds: float) -> None:
        text = f"a step takes {seconds:.3g} s on {counted(self._ranks, 'rank')}"
        earlier = [_facts(entry) for entry in read_journal(folder) if entry.kind is Kind.STEP_TIME]
        before, ranks = next(filter(None, reversed(earlier)), (seconds, self._ranks))
        if ranks != self._ranks:
            text += f"; it took {before:.3g} s on {counted(ranks, 'rank')}"
            console.say(f"note: {text}")
        Journal(folder).write(Kind.STEP_TIME, text, self._iteration, seconds=seconds, ranks=self._ranks)


def _facts(entry: Entry) -> tuple[float, int] | None:
    """Return the seconds of a step and the number of ranks in an entry; None if the entry is damaged."""
    seconds, ranks = entry.facts.get("seconds"), entry.facts.get("ranks")
    return (seconds, ranks) if isinstance(seconds, float) and isinstance(ranks, int) else None
