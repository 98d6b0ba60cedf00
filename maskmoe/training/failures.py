"""How a training run ends before its time: with a line for people, and an exit code for the scheduler."""

import errno
import multiprocessing
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
)
from megatron.training import get_signal_handler
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint.saving import remove_unfinished_checkpoints
from maskmoe.checkpoint.series import read_tracker
from maskmoe.errors import RunFailure
from maskmoe.interruption import EXIT_REQUEUE, SIGNALS_THAT_SAVE
from maskmoe.training.data_files import DataFiles

# Megatron repeats a step that gave a NaN or infinite loss or gradient, says which in the log, and exits with these.
_RERUN_VERDICTS = {
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION: "a loss or gradient was NaN or infinite, and not so when the step was "
    "repeated: the device that the log names may be faulty",
    EXIT_CODE_RESUME_TO_DISAMBIGUATE: "a loss or gradient was NaN or infinite, and so again when the step was "
    "repeated: started again, if possible on other devices, the run tells whether the device or the model is at fault",
}
_NO_SPACE = 1 << 20  # bytes
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class SaveOnSignal:
    """Lets every signal of `SIGNALS_THAT_SAVE` do what Megatron does on `--exit-signal`, once there is what to save.

    Megatron saves after the iteration in progress. Before the first, a rank may wait for others without looking at
    signals; so until then `--exit-signal`, by which torchrun ends ranks, ends it at once as it would any process.

    Args:
        args: Megatron's arguments, whose handler is in place.
    """

    def __init__(self, args: Namespace):
        self._exit_signal = args.exit_signal
        self._handler = signal.getsignal(args.exit_signal) if args.exit_signal_handler else None
        self._has_begun = self._handler is None
        if self._handler is not None:
            for number in SIGNALS_THAT_SAVE:
                signal.signal(number, self._handler)
            signal.signal(self._exit_signal, signal.SIG_DFL)

    def begin(self) -> None:
        """Training has begun; may be called repeatedly."""
        if not self._has_begun:
            signal.signal(self._exit_signal, self._handler)
            self._has_begun = True

    @contextmanager
    def requeueing(self) -> Iterator[None]:
        """Tell by the exit code if the run ended on a signal: Megatron's 0 becomes `EXIT_REQUEUE`."""
        try:
            yield
        except SystemExit as end:
            if self._handler is not None and not end.code and any(get_signal_handler().signals_received()):
                sys.exit(EXIT_REQUEUE)
            raise


@contextmanager
def ending_data_workers() -> Iterator[None]:
    """Kill the data loaders' workers at the end, be it good or bad.

    Python ends them by SIGTERM when the process exits and waits for that. Megatron makes them ignore it, so that a
    signal to the process group does not end them before the last save. So the process would never end.
    """
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for a worker's failure
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


@contextmanager
def explaining_failures(args: Namespace, data_files: DataFiles) -> Iterator[None]:
    """Say in one line what made a save or the training fail, and from where the run can go on.

    Args:
        args: Megatron's arguments.
        data_files: suspected first, if anything fails: where a data loader's worker reads, it is the worker that is
            killed, and this process fails wherever it is.

    Raises:
        RunFailure: instead of a traceback of what is no fault of the program.
    """
    try:
        yield
    except CheckpointException as error:
        causes = {str(cause) for cause, _ in error.failures.values()}
        raise _save_failure(args, "; ".join(sorted(causes)) or "another rank says why") from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS or not args.save:
            raise
        raise _save_failure(args, str(error)) from error
    except RuntimeError:
        data_files.check_all()
        raise
    except SystemExit as end:
        if end.code in _RERUN_VERDICTS and torch.distributed.get_rank() == 0:
            print(f"error: {_RERUN_VERDICTS[end.code]}. {_where_to_go_on(args)}", file=sys.stderr)
        raise


def _save_failure(args: Namespace, cause: str) -> RunFailure:
    # Megatron's writer does not always hand on what the system told it.
    free = shutil.disk_usage(args.save).free
    space = "no space is left there" if free < _NO_SPACE else f"{free / 2**30:.1f} GiB are free there"
    if torch.distributed.get_rank() == 0:
        remove_unfinished_checkpoints(args.save)
    return RunFailure(f"cannot save a checkpoint to {args.save}: {space}; {cause}. {_where_to_go_on(args)}")


def _where_to_go_on(args: Namespace) -> str:
    newest = read_tracker(args.save) if args.save else None
    return f"The newest checkpoint is of iteration {newest}" if newest is not None else "There is no checkpoint yet"
