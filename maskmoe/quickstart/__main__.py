"""Entry point of `launch/quickstart.sh`."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from maskmoe.cli import EXIT_BAD_INPUT, atomic_output, run_tool
from maskmoe.errors import UserError
from maskmoe.quickstart.devices import find_devices
from maskmoe.quickstart.lock import locked
from maskmoe.quickstart.plan import Plan
from maskmoe.quickstart.progress import ProgressLine
from maskmoe.quickstart.record import RunRecord
from maskmoe.quickstart.report import collect_results, draw_loss_curve, render_report
from maskmoe.quickstart.runner import Runner, StageError, read_log
from maskmoe.quickstart.settings import parse_settings


def main() -> None:
    settings = parse_settings()
    settings.check()
    run_to_end(Plan(settings, find_devices()), write_report)


def run_to_end(plan: Plan, report: Callable[[Plan, RunRecord], str]) -> None:
    """Run all stages that are not finished, then print the report; the exit code says how it went.

    Args:
        plan: the stages.
        report: makes the report of a finished run.

    Raises:
        UserError: another quickstart is at work in the run folder, or the input cannot be used.
        SystemExit: a stage failed (1, or 2 if the input is at fault), or a signal came.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    line = ProgressLine(sys.stdout)
    try:
        plan.files.folder.mkdir(parents=True, exist_ok=True)
        with locked(plan.files.lock) as lock:
            record = RunRecord(plan.files.record)
            Runner(plan, record, line, lock).run()
            line.print(f"\n{report(plan, record)}")
    except OSError as error:
        raise UserError(f"cannot work in --run-dir {plan.files.folder}: {error}") from error
    except StageError as error:
        line.clear()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT if error.failure.is_bad_input else 1)
    except KeyboardInterrupt:
        line.print("interrupted; the same command goes on from here")
        sys.exit(130)


def write_report(plan: Plan, record: RunRecord) -> str:
    """Write the report and the loss curve of a finished run; returns the report."""
    results = collect_results(plan, record, read_log(plan.files.log("train")))
    draw_loss_curve(results, plan.files.loss_curve)
    report = render_report(results)
    with atomic_output(plan.files.report) as path:
        path.write_text(report, encoding="utf-8")
    return report


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    run_tool(main)
