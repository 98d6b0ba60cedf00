"""Entry point of `launch/quickstart.sh`."""

import signal
import sys
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
from maskmoe.quickstart.settings import Settings, parse_settings


def main() -> None:
    settings = parse_settings()
    settings.check()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --run-dir {settings.run_dir}: {error.strerror}") from error
    line = ProgressLine(sys.stdout)
    try:
        quickstart(settings, line)
    except StageError as error:
        line.print(f"error: {error}")
        sys.exit(EXIT_BAD_INPUT if error.failure.is_bad_input else 1)
    except KeyboardInterrupt:
        line.print("interrupted; the same command goes on from here")
        sys.exit(130)


def quickstart(settings: Settings, line: ProgressLine) -> None:
    """Run all stages that are not finished in the run folder, then report.

    Raises:
        UserError: another quickstart is at work there, or the input cannot be used.
        StageError: a stage failed.
    """
    plan = Plan(settings, find_devices())
    with locked(plan.files.lock) as lock:
        record = RunRecord(plan.files.record)
        Runner(plan, record, line, lock).run()
        results = collect_results(plan, record, read_log(plan.files.log("train")))
        report = render_report(results)
        draw_loss_curve(results, plan.files.loss_curve)
        with atomic_output(plan.files.report) as path:
            path.write_text(report, encoding="utf-8")
    line.print()
    line.print(report)


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    run_tool(main)
