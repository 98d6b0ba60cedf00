"""Runs an entry point as a rank: its console, and its end; and programs with a builder of models of the user's own."""

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from maskmoe.errors import RunFailure, UserError
from maskmoe.processes.console import console
from maskmoe.processes.run_tool import run_tool

if TYPE_CHECKING:
    from maskmoe.training.model.model_builder import StageBuilder

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


def run_program(module_name: str, builder: Callable[[], type["StageBuilder"]]) -> None:
    """Train or evaluate with another builder of models: `FILE pretrain FLAGS…` or `FILE evaluate FLAGS…`.

    A Python file ends with this call. It is the `program` of a suite or of a model file.

    Args:
        module_name: `__name__` of the file. Megatron's helper processes import the file by another name.
        builder: Returns the class of the builder, a subclass of `MaskMoEHybridModelBuilder` or, for models without
            `--hybrid-layer-pattern`, of `MaskMoEGPTModelBuilder`. Megatron can be imported when this function is
            called, and not before.
    """
    if module_name == "__mp_main__":
        prepare_helper()
    if module_name != "__main__":
        return
    if sys.argv[1:2] not in (["pretrain"], ["evaluate"]):
        sys.exit(f"usage: {sys.argv[0]} pretrain|evaluate FLAGS…")
    task = sys.argv.pop(1)
    run_rank(partial(import_module(f"maskmoe.training.{task}").main, builder), task)


def _run_with_last_lines(main: Callable[[], None]) -> None:
    """Run the entry point; if it ends without an explanation of ours, show the newest lines that were only logged."""
    try:
        main()
    finally:
        error = sys.exception()
        is_success = isinstance(error, SystemExit) and error.code in (None, 0)
        if console.log is not None and not (is_success or isinstance(error, UserError | RunFailure | None)):
            sys.stderr.write(console.log.last_lines())
