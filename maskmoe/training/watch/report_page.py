"""Keeps the page report.html of a run up to date."""

from argparse import Namespace
from contextlib import ExitStack

from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.run_report import RunReport


class ReportPage(Callback):
    """Writes the page from time to time, and at the end of the run.

    Args:
        args: Megatron's arguments, see `RunReport`.
    """

    def __init__(self, args: Namespace) -> None:
        self._report = RunReport(args)
        self._end = ExitStack()

    def on_start(self) -> None:
        """Begin to follow the run."""
        self._end.enter_context(self._report.following())

    def before_micro_batch(self) -> None:
        """Write the page if it is time."""
        self._report()

    def on_end(self, error: BaseException | None) -> None:
        """Write the last page."""
        self._end.close()
