"""Early ends of a training run: saving on a signal, one line that explains a failure, and the exit code."""

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
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint.saving import remove_unfinished_checkpoints
from maskmoe.checkpoint.series import read_tracker
from maskmoe.errors import RunFailure
from maskmoe.interruption import EXIT_REQUEUE, SIGNALS_THAT_SAVE
from maskmoe.megatron_compat.globals import get_signal_handler
from maskmoe.training.data_files import DataFiles

# If a loss or gradient is NaN or infinite, Megatron repeats the step, names the rank in the log and exits with these
# codes.
_RERUN_VERDICTS = {
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION: "a loss or gradient was NaN or infinite, and not so when the step was "
    "repeated: the device that the log names may be faulty",
    EXIT_CODE_RESUME_TO_DISAMBIGUATE: "a loss or gradient was NaN or infinite, and so again when the step was "
    "repeated: start the run again, if possible on other devices, to find out whether the device or the model is at "
    "fault",
}
_NO_SPACE = 1 << 20  # bytes
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class SaveOnSignal:
    """Makes Megatron save a checkpoint on every signal of `SIGNALS_THAT_SAVE`, not only on `--exit-signal`.

    Megatron saves after the iteration in progress. Before the first iteration there is nothing to save, and a rank may
    wait for other ranks without handling signals. So until then, `--exit-signal`, with which torchrun ends ranks, ends
    the process at once.

    Args:
        args: Megatron's arguments. Megatron has installed its handler of `--exit-signal`.
    """

    def __init__(self, args: Namespace) -> None:
        self._exit_signal = args.exit_signal
        self._handler = signal.getsignal(args.exit_signal) if args.exit_signal_handler else None
        self._has_begun = self._handler is None
        if self._handler is not None:
            for number in SIGNALS_THAT_SAVE:
                signal.signal(number, self._handler)
            signal.signal(self._exit_signal, signal.SIG_DFL)

    def begin(self) -> None:
        """Save on `--exit-signal` from now on, since training has begun; further calls do nothing."""
        if not self._has_begun:
            signal.signal(self._exit_signal, self._handler)
            self._has_begun = True

    @contextmanager
    def requeueing(self) -> Iterator[None]:
        """Turn Megatron's exit code 0 into `EXIT_REQUEUE` if the run ended because of a signal."""
        try:
            yield
        except SystemExit as end:
            if self._handler is not None and not end.code and any(get_signal_handler().signals_received()):
                sys.exit(EXIT_REQUEUE)
            raise


@contextmanager
def ending_data_workers() -> Iterator[None]:
    """Kill the workers of the data loaders at the end of the block, also if the block fails.

    When the process exits, Python sends SIGTERM to the workers and waits for their end. But Megatron makes workers
    ignore SIGTERM, so that a signal to the process group does not end them before the last save. The process would
    never end.
    """
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a failed worker
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


@contextmanager
def explaining_failures(args: Namespace, data_files: DataFiles) -> Iterator[None]:
    """Explain a failed save or a changed data file in one line, which also names the newest checkpoint.

    Args:
        args: Megatron's arguments.
        data_files: Checked after any RuntimeError: if a data file shrinks, a worker of the data loader may be killed,
            and this process then fails in a place that has nothing to do with the file.

    Raises:
        RunFailure: The cause lies outside the program.
    """
    try:
        yield
    except CheckpointException as error:
        causes = {str(cause) for cause, _ in error.failures.values()}
        raise _save_failure(args, "; ".join(sorted(causes)) or "another rank reports the cause") from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS or not args.save:
            raise
        raise _save_failure(args, str(error)) from error
    except RuntimeError:
        data_files.check_all()
        raise
    except SystemExit as end:
        if end.code in _RERUN_VERDICTS and torch.distributed.get_rank() == 0:
            print(f"error: {_RERUN_VERDICTS[end.code]}. {_newest_checkpoint(args)}", file=sys.stderr)
        raise


def _save_failure(args: Namespace, cause: str) -> RunFailure:
    """Return the failure of a save. Megatron's writer may hide the system's error, so report the free space, too."""
    free = shutil.disk_usage(args.save).free
    space = "no space is left there" if free < _NO_SPACE else f"{free / 2**30:.1f} GiB are free there"
    if torch.distributed.get_rank() == 0:
        remove_unfinished_checkpoints(args.save)
    return RunFailure(f"cannot save a checkpoint to {args.save}: {space}; {cause}. {_newest_checkpoint(args)}")


def _newest_checkpoint(args: Namespace) -> str:
    """Return a sentence about the newest checkpoint of the run."""
    newest = read_tracker(args.save) if args.save else None
    return f"The newest checkpoint is of iteration {newest}" if newest is not None else "There is no checkpoint yet"
