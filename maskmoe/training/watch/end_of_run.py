"""What a run leaves when it ends: the end in its journal, and the page report.html."""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskmoe.command_line.run_tool import EXIT_RUN_FAILURE
from maskmoe.errors import UserError, one_line
from maskmoe.launch.journal import Journal, Kind
from maskmoe.launch.run_folder import run_folder
from maskmoe.processes.interruption import EXIT_REQUEUE, EXIT_REWIND
from maskmoe.run_status.page import REPORT
from maskmoe.training.loop.rank_store import RankStore
from maskmoe.training.watch.console import console

_MOST_SECONDS_FOR_PAGE = 30.0


@contextmanager
def recording_end(folder: Path | None, ranks: RankStore) -> Iterator[None]:
    """Write into the run's journal how the block ended.

    The last rank writes, which knows the loss. If the block fails, the first rank writes, too: the other rank may be
    killed before it can write.

    Args:
        folder: the run folder; None if there is none.
        ranks: says which rank this process is.
    """
    code, text = 0, "the training is complete"
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        text = "the run stopped on request" if code in (0, EXIT_REQUEUE) else f"the run ended with exit code {code}"
        raise
    except BaseException as error:
        code, text = EXIT_RUN_FAILURE, f"the run failed: {one_line(error) or type(error).__name__}"
        raise
    finally:
        is_writer = ranks.rank == ranks.world_size - 1 or (ranks.rank == 0 and code not in (0, EXIT_REQUEUE))
        # Ranks that go back are started again, which is no end.
        if is_writer and code != EXIT_REWIND:
            facts: dict[str, Any] = {"exit_code": code}
            if console.iteration is not None and console.iteration.loss is not None:
                facts["loss"] = console.iteration.loss
            Journal(folder).write(Kind.ENDED, text, **facts)


@contextmanager
def writing_page(args: Namespace, ranks: RankStore) -> Iterator[None]:
    """Let the first rank write the page of the run after the block, unless the block refuses the run.

    Another process writes the page, so that neither its memory, its time nor an error of it can disturb the training.

    Args:
        args: Megatron's arguments.
        ranks: says which rank this process is.
    """
    try:
        yield
    finally:
        folder = run_folder(args.save, args.tensorboard_dir)
        if args.report and folder is not None and ranks.rank == 0 and not isinstance(sys.exception(), UserError):
            page = folder / REPORT
            words = [sys.executable, "-m", "maskmoe.run_status.page", folder, page]
            # In a session of its own, so that a signal to the run does not end the process.
            options: dict[str, Any] = {"start_new_session": True, "timeout": _MOST_SECONDS_FOR_PAGE}
            try:
                subprocess.run(words, **options, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            except (OSError, subprocess.SubprocessError) as error:
                note = f"`maskmoe status {folder} --html {page} --force` writes it"
                print(f"warning: {page} is not written; {note}: {error}", file=sys.stderr, flush=True)
