"""Early ends of a training run: one line that explains a failure, and the exit code."""

import errno
import multiprocessing
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import rerun_state_machine
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint.saver import SaveError, describe_failures
from maskmoe.checkpoint.series import newest_sound, non_persistent_folder, read_tracker, remove_unfinished_checkpoints
from maskmoe.errors import RunFailure
from maskmoe.megatron_compat.globals import get_signal_handler
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load, pretrained_to_load
from maskmoe.training.watch.leave_after_save import LeaveAfterSave

# If a loss or gradient is NaN or infinite, Megatron repeats the step, names the rank in the log and exits with these
# codes.
_RERUN_VERDICTS = {
    rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION: "a loss or gradient was NaN or infinite, and not so "
    "when the step was repeated: the device that the log names may be faulty",
    rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE: "a loss or gradient was NaN or infinite, and so again when "
    "the step was repeated: start the run again, if possible on other devices, to find out whether the device or the "
    "model is at fault",
}
_NO_SPACE = 1 << 20  # bytes
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def explaining_early_ends(args: Namespace, leaving: LeaveAfterSave) -> Iterator[None]:
    """Explain why the block ends early, exit with the right code, and end the workers of the data loaders.

    A failed save and a failed load are explained in one line. If the block ends because of a signal, or because the
    launcher asks for it, Megatron's exit code 0 becomes `EXIT_REQUEUE`.

    Args:
        args: Megatron's arguments.
        leaving: Knows whether the launcher has asked the run to end.

    Raises:
        RunFailure: The cause lies outside the program.
    """
    try:
        yield
    except SaveError as error:
        raise _save_failure(args, str(error)) from error
    except CheckpointException as error:
        checkpoint = checkpoint_to_load(args) or pretrained_to_load(args)
        raise RunFailure(
            f"cannot load {checkpoint}: {describe_failures(error)}; remove the cause and start the run again"
        ) from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS or not args.save:
            raise
        raise _save_failure(args, str(error)) from error
    except SystemExit as end:
        if end.code in _RERUN_VERDICTS and torch.distributed.get_rank() == 0:
            print(f"error: {_RERUN_VERDICTS[end.code]}. {describe_newest_checkpoint(args)}", file=sys.stderr)
        has_signal = args.exit_signal_handler and any(get_signal_handler().signals_received())
        if not end.code and (has_signal or leaving.is_leaving):
            sys.exit(EXIT_REQUEUE)
        raise
    finally:
        # When the process exits, Python sends SIGTERM to the workers and waits for their end. But Megatron makes
        # workers ignore SIGTERM, so that a signal to the process group does not end them before the last save. The
        # process would never end.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a failed worker
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


def _save_failure(args: Namespace, cause: str) -> RunFailure:
    """Return the failure of a save. Megatron's writer may hide the system's error, so report the free space, too."""
    folders = [Path(args.save)]
    local = non_persistent_folder(args, args.save)
    if local is not None and local.exists():
        folders.append(local)
    spaces = "; ".join(map(_describe_space, folders))  # before unfinished checkpoints are removed
    if torch.distributed.get_rank() == 0:
        for folder in folders:
            remove_unfinished_checkpoints(folder)
    return RunFailure(f"cannot save a checkpoint to {spaces}; {cause}. {describe_newest_checkpoint(args)}")


def _describe_space(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    space = "no space is left there" if free < _NO_SPACE else f"{free / 2**30:.1f} GiB are free there"
    return f"{folder}: {space}"


def describe_newest_checkpoint(args: Namespace) -> str:
    """Return a sentence about the newest checkpoint of the run."""
    newest = read_tracker(args.save) if args.save else None
    local = non_persistent_folder(args, args.save)
    newest_local = newest_sound(local) if local is not None else None
    if newest_local is not None and not (isinstance(newest, int) and newest >= newest_local):
        return f"The newest checkpoint is the non-persistent one of iteration {newest_local}"
    return f"The newest checkpoint is of iteration {newest}" if newest is not None else "There is no checkpoint yet"
