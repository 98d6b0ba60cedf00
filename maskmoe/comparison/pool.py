"""Run several runs at a time, each in a process of its own."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.runs import Run
from maskmoe.errors import RunFailure
from maskmoe.workflow.lock import RunLock
from maskmoe.workflow.process import StageProcess
from maskmoe.workflow.progress import ProgressLine, format_seconds

_POLL_SECONDS = 0.5


class Pool:
    """Runs a limited number of runs at a time. A run that fails does not stop the other runs.

    Args:
        comparison: the comparison to which the runs belong.
        command: the command that finishes one run; the name of the run is appended.
        jobs: number of runs at a time.
        line: shows the progress.
        lock: lock of the comparison's folder.
    """

    def __init__(
        self, comparison: Comparison, command: Sequence[str], jobs: int, line: ProgressLine, lock: RunLock
    ) -> None:
        self._comparison = comparison
        self._command = command
        self._jobs = jobs
        self._line = line
        self._lock = lock

    def finish(self, runs: Sequence[Run]) -> None:
        """Finish all runs.

        Raises:
            RunFailure: at least one run failed. The message names all runs that failed.
        """
        waiting, active, failed = list(runs), list[_ActiveRun](), list[_ActiveRun]()
        start = time.monotonic()
        try:
            while waiting or active:
                # Start as many runs as may run at a time.
                while waiting and len(active) < self._jobs:
                    active.append(_ActiveRun(self._comparison.folder, waiting.pop(0), self._command, self._lock))
                time.sleep(_POLL_SECONDS)
                # Report the runs that have ended.
                for job in [job for job in active if job.has_ended()]:
                    active.remove(job)
                    done = len(runs) - len(waiting) - len(active)
                    verdict = "FAILED" if job.exit_code else "done"
                    self._line.print(f"[{done}/{len(runs)}] {job.run.name} {verdict} in {format_seconds(job.seconds)}")
                    if job.exit_code:
                        failed.append(job)
                self._show(len(runs), len(waiting), active, time.monotonic() - start)
        except BaseException:
            self._line.print("stopping")
            for job in active:
                job.process.stop()
            raise
        if failed:
            reasons = "; ".join(f"{job.run.name}: {job.last_line}" for job in failed)
            raise RunFailure(f"{len(failed)} of {len(runs)} runs failed: {reasons}")

    def _show(self, total: int, num_waiting: int, active: "Sequence[_ActiveRun]", seconds: float) -> None:
        done = total - num_waiting - len(active)
        eta = f" · ETA {format_seconds(seconds / done * (total - done))}" if done else ""
        states = " · ".join(f"{job.run.name}: {job.last_line}" for job in active)
        self._line.update(f"{done}/{total} runs{eta} · {states}")


class _ActiveRun:
    """A process that finishes one run."""

    def __init__(self, folder: Path, run: Run, command: Sequence[str], lock: RunLock) -> None:
        self.run = run
        log = folder / run.name / "progress.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = StageProcess((*command, run.name), {}, log, lock)
        self.last_line = "starts"
        self._start = time.monotonic()

    @property
    def exit_code(self) -> int | None:
        return self.process.exit_code

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def has_ended(self) -> bool:
        """Return whether the process has ended, and read the lines that the process has printed."""
        has_ended = self.exit_code is not None
        for line in self.process.new_lines():
            self.last_line = line.strip() or self.last_line
        return has_ended


def run_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the command that finishes one run, up to the name of the run, which must follow.

    Args:
        arguments: arguments of this process.
    """
    return (sys.executable, "-P", "-m", "maskmoe", "compare", *arguments, "--run")
