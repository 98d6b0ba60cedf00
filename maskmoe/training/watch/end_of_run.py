"""What a run leaves when it ends: the end in its journal, and the page report.html."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskmoe.command_line.run_tool import EXIT_RUN_FAILURE
from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import REPORT, Journal, Kind
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.loop.rank_store import RankStore
from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.console import console

_MOST_SECONDS_FOR_PAGE = 30.0


class EndOfRun(Callback):
    """Writes into the run's journal how the run ended.

    The last rank writes, which knows the loss. If the run fails, the first rank writes, too: the last rank may be
    killed before it can write.

    Args:
        folder: the run folder; None if there is none.
        ranks: says which rank this process is.
    """

    def __init__(self, folder: Path | None, ranks: RankStore) -> None:
        self._folder = folder
        self._ranks = ranks

    def on_end(self, error: BaseException | None) -> None:
        """Write the end."""
        code, text = _describe_end(error)
        ranks = self._ranks
        if ranks.rank == ranks.world_size - 1 or (ranks.rank == 0 and code not in (0, EXIT_REQUEUE)):
            facts: dict[str, Any] = {"exit_code": code}
            if console.iteration is not None and console.iteration.loss is not None:
                facts["loss"] = console.iteration.loss
            Journal(self._folder).write(Kind.ENDED, text, **facts)


def _describe_end(error: BaseException | None) -> tuple[int, str]:
    """Return the exit code of a run and a sentence about its end; see `Callback.on_end` for the argument."""
    if error is None:
        return 0, "the training is complete"
    if not isinstance(error, SystemExit):
        return EXIT_RUN_FAILURE, f"the run failed: {one_line(error) or type(error).__name__}"
    code = error.code if isinstance(error.code, int) else 0
    return code, "the run stopped on request" if code in (0, EXIT_REQUEUE) else f"the run ended with exit code {code}"


@contextmanager
def writing_page(folder: Path | None, ranks: RankStore) -> Iterator[None]:
    """Let the first rank write the page of the run after the block, unless the block refuses the run.

    Args:
        folder: the run folder; None to write no page.
        ranks: says which rank this process is.
    """
    try:
        yield
    finally:
        if folder is not None and ranks.rank == 0 and not isinstance(sys.exception(), UserError):
            _write_page(folder)


def _write_page(folder: Path) -> None:
    """Write the page in another process, so that neither its memory, its time nor an error can disturb the run."""
    page = folder / REPORT
    words = [sys.executable, "-m", "maskmoe", "status", folder, "--html", page, "--force"]
    # In a session of its own, so that a signal to the run does not end the process.
    options: dict[str, Any] = {"start_new_session": True, "timeout": _MOST_SECONDS_FOR_PAGE}
    try:
        subprocess.run(words, **options, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        note = f"`maskmoe status {folder} --html {page} --force` writes it"
        print(f"warning: {page} is not written; {note}: {error}", file=sys.stderr, flush=True)
