"""Entry point of `launch/quickstart.sh`."""

from maskmoe.cli import atomic_output, run_tool
from maskmoe.launch.devices import find_devices
from maskmoe.quickstart.plan import Plan
from maskmoe.quickstart.report import collect_results, draw_loss_curve, render_report
from maskmoe.quickstart.settings import parse_settings
from maskmoe.workflow.entry import run_to_end
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import read_log


def main() -> None:
    settings = parse_settings()
    settings.check()
    run_to_end(Plan(settings, find_devices()), write_report)


def write_report(plan: Plan, record: RunRecord) -> str:
    """Write the report and the loss curve of a finished run; returns the report."""
    results = collect_results(plan, record, read_log(plan.files.log("train")))
    draw_loss_curve(results, plan.files.loss_curve)
    report = render_report(results)
    with atomic_output(plan.files.report) as path:
        path.write_text(report, encoding="utf-8")
    return report


if __name__ == "__main__":
    run_tool(main)
