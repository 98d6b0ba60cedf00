"""Reports what deserves a look in a running training: on the console and in the journal of the run."""

from pathlib import Path

from maskmoe.files.run_folder import Fact, Journal, Kind
from maskmoe.training.watch.console import console


class RunWarnings:
    """Warns on the last rank, which logs.

    Args:
        run_folder: The run folder, whose journal takes the warnings; None if there is none.
    """

    def __init__(self, run_folder: Path | None) -> None:
        self._journal = Journal(run_folder)

    def warn(self, text: str, iteration: int, **facts: Fact) -> None:
        """Print a line and write an entry; to be called on the last rank only.

        Args:
            text: The event in words, on one line.
            iteration: The iteration of the event, counted from 1.
            **facts: Values for programs that read the journal.
        """
        console.say(f"warning: {text}", rank=-1)
        self._journal.write(Kind.WARNED, text, iteration, **facts)
