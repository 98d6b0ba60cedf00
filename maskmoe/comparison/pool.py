"""Several runs at a time, each a process of its own."""

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
    """Works off runs, so many at a time.

    A run that fails does not stop the others; it is told at the end.

    Args:
        comparison: that the runs belong to.
        command: that takes up one run, whose name follows it.
        jobs: runs at a time.
        line: shows how far they are.
        lock: of the comparison's folder.
    """

    def __init__(self, comparison: Comparison, command: Sequence[str], jobs: int, line: ProgressLine, lock: RunLock):
        self._comparison = comparison
        self._command = command
        self._jobs = jobs
        self._line = line
        self._lock = lock

    def work_off(self, runs: Sequence[Run]) -> None:
        """Bring all runs to their ends.

        Raises:
            RunFailure: some failed.
        """
        waiting, at_work, failed = list(runs), [], []
        start = time.monotonic()
        try:
            while waiting or at_work:
                while waiting and len(at_work) < self._jobs:
                    at_work.append(_RunAtWork(self._comparison.folder, waiting.pop(0), self._command, self._lock))
                time.sleep(_POLL_SECONDS)
                for job in [job for job in at_work if job.has_ended()]:
                    at_work.remove(job)
                    done = len(runs) - len(waiting) - len(at_work)
                    verdict = "FAILED" if job.exit_code else "done"
                    self._line.print(f"[{done}/{len(runs)}] {job.run.name} {verdict} in {format_seconds(job.seconds)}")
                    if job.exit_code:
                        failed.append(job)
                self._show(len(runs), len(waiting), at_work, time.monotonic() - start)
        except BaseException:
            self._line.print("stopping")
            for job in at_work:
                job.process.stop()
            raise
        if failed:
            reasons = "; ".join(f"{job.run.name}: {job.last_line}" for job in failed)
            raise RunFailure(f"{len(failed)} of {len(runs)} runs failed: {reasons}")

    def _show(self, total: int, num_waiting: int, at_work: "Sequence[_RunAtWork]", seconds: float) -> None:
        done = total - num_waiting - len(at_work)
        eta = f" · ETA {format_seconds(seconds / done * (total - done))}" if done else ""
        states = " · ".join(f"{job.run.name}: {job.last_line}" for job in at_work)
        self._line.update(f"{done}/{total} runs{eta} · {states}")


class _RunAtWork:
    """A process that takes up one run."""

    def __init__(self, folder: Path, run: Run, command: Sequence[str], lock: RunLock):
        self.run = run
        log = folder / run.name / "progress.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = StageProcess((*command, run.name), {}, log, lock, Path.cwd())
        self.last_line = "starts"
        self._start = time.monotonic()

    @property
    def exit_code(self) -> int | None:
        return self.process.exit_code

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def has_ended(self) -> bool:
        """Whether it has; also reads what it has printed."""
        ended = self.exit_code is not None
        for line in self.process.new_lines():
            self.last_line = line.strip() or self.last_line
        return ended


def run_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command that takes up one run, without the name of the run.

    Args:
        arguments: of this process.
    """
    return (sys.executable, "-P", "-m", "maskmoe.comparison", *arguments, "--run")
