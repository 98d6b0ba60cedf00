"""Runs an entry point as a rank: its console, and its end."""

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

from maskmoe.errors import RunFailure, UserError
from maskmoe.processes.console import console
from maskmoe.processes.run_tool import run_tool

_HELP_FLAGS = {"-h", "--help", "--help-all"}


def run_rank(main: Callable[[], None], name: str) -> None:
    """Run the entry point `main` of this process, which is a rank, and exit with its exit code."""
    code: int | None = None  # until this function sees the end

    def leave() -> None:
        """End this process with its exit code; a process that was forked from this one ends as usual.

        Do not run destructors of C++ libraries: threads of gloo and NCCL live on and could make the destructors abort.
        """
        if code is not None:
            logging.shutdown()
            for stream in (console.result, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)

    # Exit handlers run in the reverse order of their registration: register first, to run last.
    atexit.register(leave)
    # The report of a check, and the help, are the output of the process.
    if name != "check" and _HELP_FLAGS.isdisjoint(sys.argv[1:]):
        console.route(sys.stdout if name == "pretrain" else sys.stderr)
    try:
        run_tool(lambda: _run_with_last_lines(main))
        code = 0
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
        raise
    except BaseException:
        code = 1
        raise


def prepare_rank() -> None:
    """Prepare this process for Megatron, before the first import of Megatron; the imports take seconds."""
    console.load("importing PyTorch and Megatron-Core")
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    console.route_logging()


def prepare_helper() -> None:
    """Prepare a process that Megatron has spawned from a rank, such as the writer of checkpoints."""
    warnings.simplefilter("ignore")
    from maskmoe.megatron_compat import prepare_process

    prepare_process()


def _run_with_last_lines(main: Callable[[], None]) -> None:
    """Run the entry point; if it ends without an explanation of ours, show the newest lines that were only logged."""
    try:
        main()
    finally:
        error = sys.exception()
        is_success = isinstance(error, SystemExit) and error.code in (None, 0)
        if console.log is not None and not (is_success or isinstance(error, UserError | RunFailure | None)):
            sys.stderr.write(console.log.last_lines())
