"""Run a plan of stages as the main function of a command."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from maskmoe.cli import EXIT_BAD_INPUT
from maskmoe.errors import UserError
from maskmoe.workflow.lock import locked
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import Runner, StageError
from maskmoe.workflow.stage import Plan


def run_to_end(plan: Plan, report: Callable[[RunRecord], str]) -> None:
    """Run all unfinished stages, then print the report.

    Args:
        plan: the stages.
        report: returns the report of a finished run.

    Raises:
        UserError: another command works in the run folder, or the input cannot be used.
        SystemExit: a stage failed (exit code 1, or 2 if the input is at fault), or a signal arrived.
    """
    line = ProgressLine(sys.stdout)
    with working_in(plan.files.folder, line):
        record = run_stages(plan, line)
        line.print(f"\n{report(record)}")


def run_stages(plan: Plan, line: ProgressLine) -> RunRecord:
    """Run all unfinished stages in the plan's folder, which is created if missing.

    Raises:
        UserError: another command works in the folder, or a stage cannot use what an earlier stage has made.
        StageError: a stage failed.
    """
    plan.files.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.files.lock) as lock:
        record = RunRecord(plan.files.record)
        Runner(plan, record, line, lock).run()
    return record


@contextmanager
def working_in(folder: Path, line: ProgressLine) -> Iterator[None]:
    """Translate errors and signals in the block into an exit code and one line.

    Args:
        folder: folder of the run.
        line: shows the progress.

    Raises:
        UserError: the folder cannot be used.
        SystemExit: a stage failed (exit code 1, or 2 if the input is at fault), or a signal arrived.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot work in --run-dir {folder}: {error}") from error
    except StageError as error:
        line.clear()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT if error.failure.is_bad_input else 1)
    except KeyboardInterrupt:
        line.print("interrupted; start the same command again to resume")
        sys.exit(130)


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
