"""Writes the end of a run: its entry in the journal, the last line, and the page report.html."""

import math
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskmoe.checkpoint.series import newest_saved, read_tracker
from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import REPORT, Journal, Kind
from maskmoe.processes.console import console
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.processes.run_tool import EXIT_RUN_FAILURE
from maskmoe.training.ranks import Ranks
from maskmoe.training.watch.callback import Callback

_MOST_SECONDS_FOR_PAGE = 30.0
_TORCHRUN_DELAY = 0.3  # seconds; torchrun looks every 0.1 s for new lines of each rank


class EndOfRun(Callback):
    """Writes into the run's journal how the run ended, and prints the last line, unless a failure explains itself.

    The last rank writes and prints, because it knows the loss. If the run fails, the first rank writes, too: the last
    rank may be killed before it can write.
    """

    def __init__(self, args: Namespace, folder: Path | None, ranks: Ranks) -> None:
        self._args = args
        self._folder = folder
        self._ranks = ranks

    def on_end(self, error: BaseException | None) -> None:
        """Write the end, then print the last line after the lines that the other ranks have printed."""
        code, text = _describe_end(error)
        is_orderly = code in (0, EXIT_REQUEUE)
        if self._ranks.rank == self._ranks.world_size - 1 or (self._ranks.rank == 0 and not is_orderly):
            loss = console.losses.get("loss", math.nan)
            facts: dict[str, Any] = {"loss": loss} if math.isfinite(loss) else {}
            iteration = self._args.train_iters if error is None and not self._args.skip_train else None
            Journal(self._folder).write(Kind.ENDED, text, iteration, exit_code=code, **facts)
        if is_orderly:
            time.sleep(_TORCHRUN_DELAY)
            console.say(_describe_completion(self._args) if error is None else _describe_stop(self._args), rank=-1)


def _describe_end(error: BaseException | None) -> tuple[int, str]:
    """Return the exit code of a run and a sentence about its end; see `Callback.on_end` for the argument."""
    if error is None:
        return 0, "the training is complete"
    if not isinstance(error, SystemExit):
        return EXIT_RUN_FAILURE, f"the run failed: {one_line(error) or type(error).__name__}"
    code = error.code if isinstance(error.code, int) else 0
    return code, "the run stopped on request" if code in (0, EXIT_REQUEUE) else f"the run ended with exit code {code}"


def _describe_stop(args: Namespace) -> str:
    found = newest_saved(args)
    if found is None:
        return "stopped: nothing was saved" + ("" if args.save else ", because --save is not given")
    folder, newest = found
    resumption = "the same command resumes"
    if args.no_save_optim and not args.no_load_optim:
        resumption = "without the optimizer (--no-save-optim), so --no-load-optim is needed to resume"
    return f"stopped: saved iteration {newest} in {folder}; {resumption}"


def _describe_completion(args: Namespace) -> str:
    parts = ["complete: evaluated only" if args.skip_train else f"complete: {args.train_iters} iterations"]
    if "loss" not in console.losses and not args.skip_train:
        parts.append("no iteration was left to train")
    parts += (f"{name} {loss:.4f}" for name, loss in console.losses.items() if math.isfinite(loss))
    newest = read_tracker(args.save) if args.save else None
    saved = f"checkpoint {newest} is in {args.save}" if newest is not None else "no checkpoint was saved"
    return f"{', '.join(parts)}; {saved}"


@contextmanager
def writing_page(folder: Path | None, ranks: Ranks) -> Iterator[None]:
    """Let the first rank write the page of the run after the block, unless the block refuses the run."""
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
