"""Early ends of a training run: saving on a signal, one line that explains a failure, and the exit code."""

import errno
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from megatron.core import rerun_state_machine
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint.non_persistent import non_persistent_folder
from maskmoe.checkpoint.saver import SaveError, describe_failures
from maskmoe.checkpoint.series import newest_sound, read_tracker, remove_unfinished_checkpoints
from maskmoe.errors import RunFailure
from maskmoe.megatron_compat.globals import get_signal_handler
from maskmoe.processes.interruption import EXIT_REQUEUE, SIGNALS_THAT_SAVE
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load, pretrained_to_load
from maskmoe.training.watch.console import console
from maskmoe.training.watch.leaving import LeaveAfterSave

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
_TORCHRUN_DELAY = 0.3  # seconds; torchrun looks every 0.1 s for new lines of each rank
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class DataFiles:
    """The files from which a run reads its tokens, with their sizes at its start.

    The files are mapped into memory. If someone shortens a file during the run, reading beyond its new end kills the
    process by SIGBUS without a message.

    Args:
        prefixes: Prefixes of the datasets.
    """

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._sizes = {f"{prefix}.bin": os.path.getsize(f"{prefix}.bin") for prefix in prefixes}
        self._turns = itertools.cycle(self._sizes.items())

    def check(self, most: int | None = None) -> None:
        """Check the next `most` files in turn, or all files, which takes long on large parallel file systems.

        Raises:
            RunFailure: A file has become shorter or is gone.
        """
        number = len(self._sizes) if most is None else min(most, len(self._sizes))
        for path, size_at_start in itertools.islice(self._turns, number):
            try:
                size = os.path.getsize(path)
            except OSError as error:
                raise RunFailure(
                    f"{path} can no longer be read: {error.strerror}. Data files must not change while a run uses them"
                ) from error
            if size < size_at_start:
                raise RunFailure(
                    f"{path} has shrunk from {size_at_start} to {size} bytes during the run. Restore the file and "
                    "start the run again: it resumes from its last checkpoint"
                )


def check_first_step(args: Namespace, train_step: Callable[..., tuple]) -> Callable[..., tuple]:
    """Return a function like Megatron's `train_step` that fails if the first step has a NaN or infinite result.

    Megatron repeats every step whose loss or gradient is NaN or infinite, except for the first step of a process. The
    update of the first step is applied, and the next checkpoint would hold the damaged weights.

    Args:
        args: Megatron's arguments.
        train_step: Megatron's function, wrapped or not.

    Raises:
        RunFailure: The returned function raises it on all ranks, before anything is saved.
    """
    is_first = True

    @wraps(train_step)
    def checked(*step: Any, **options: Any) -> tuple:
        nonlocal is_first
        results = train_step(*step, **options)
        if is_first:
            is_first = False
            _check_is_finite(args, results)
        return results

    return checked


def _check_is_finite(args: Namespace, results: tuple) -> None:
    """Check the loss and the gradient norm in the results of `train_step`; a collective call. Raises RunFailure."""
    losses, is_skipped, _, should_exit, _, grad_norm, *_ = results
    values = [float(value) for value in (*losses.values(), grad_norm) if value is not None]
    # A skipped update, for example after an overflow in fp16, has not changed the weights.
    is_bad = not (should_exit or is_skipped or all(map(math.isfinite, values)))
    # Only the last pipeline stage has the loss.
    is_bad_on_any = torch.tensor(int(is_bad), device=torch.cuda.current_device())
    torch.distributed.all_reduce(is_bad_on_any, op=torch.distributed.ReduceOp.MAX)
    if is_bad_on_any:
        raise RunFailure(
            f"the loss or gradient of iteration {args.curr_iteration + 1} was NaN or infinite. It is the first "
            "iteration since the start, which Megatron does not repeat, so nothing is saved: start the run again, if "
            "possible on other devices; if this happens again, look for the fault in the data and the model. "
            f"{_newest_checkpoint(args)}"
        )


def save_on_signals(args: Namespace) -> Callable[[], object]:
    """Make Megatron save a checkpoint on every signal of `SIGNALS_THAT_SAVE`, not only on `--exit-signal`.

    Megatron saves after the iteration in progress. Before the first iteration there is nothing to save, and a rank may
    wait for other ranks without handling signals. So until then, `--exit-signal`, with which torchrun ends ranks, ends
    the process at once.

    Args:
        args: Megatron's arguments. Megatron has installed its handler of `--exit-signal`.

    Returns:
        A function to call when training has begun, after which `--exit-signal` saves, too; further calls change
        nothing.
    """
    if not args.exit_signal_handler:
        return lambda: None
    save = signal.getsignal(args.exit_signal)
    for number in SIGNALS_THAT_SAVE:
        signal.signal(number, save)
    signal.signal(args.exit_signal, signal.SIG_DFL)
    return partial(signal.signal, args.exit_signal, save)


@contextmanager
def handling_early_ends(args: Namespace, data_files: DataFiles, leaving: LeaveAfterSave) -> Iterator[None]:
    """Explain why the block ends early, exit with the right code, and end the workers of the data loaders.

    A failed save, a failed load and a changed data file are explained in one line. If the block ends because of a
    signal, or because the launcher asks for it, Megatron's exit code 0 becomes `EXIT_REQUEUE`.

    Args:
        args: Megatron's arguments.
        data_files: Checked after any RuntimeError: if a data file shrinks, a worker of the data loader may be killed,
            and this process then fails in a place that has nothing to do with the file.
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
    except RuntimeError:
        data_files.check()
        raise
    except SystemExit as end:
        if end.code in _RERUN_VERDICTS and torch.distributed.get_rank() == 0:
            print(f"error: {_RERUN_VERDICTS[end.code]}. {_newest_checkpoint(args)}", file=sys.stderr)
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


@contextmanager
def reporting_end(args: Namespace) -> Iterator[None]:
    """Print how the block ended, in one line on the last rank: that training is complete, or how to resume.

    The line says nothing about failures, which explain themselves.

    Args:
        args: Megatron's arguments.
    """
    try:
        yield
    except SystemExit as end:
        if end.code in (None, 0, EXIT_REQUEUE):
            _say_last(_describe_stop(args))
        raise
    _say_last(_describe_completion(args))


def _say_last(line: str) -> None:
    """Print a line on the last rank, after the lines that the other ranks have printed."""
    time.sleep(_TORCHRUN_DELAY)
    console.say(line, rank=-1)


def _describe_stop(args: Namespace) -> str:
    newest = read_tracker(args.save) if args.save else None
    if newest is None:
        return "stopped: nothing was saved" + ("" if args.save else ", because --save is not given")
    resumption = "the same command resumes"
    if args.no_save_optim and not args.no_load_optim:
        resumption = "without the optimizer (--no-save-optim), so --no-load-optim is needed to resume"
    return f"stopped: saved iteration {newest} in {args.save}; {resumption}"


def _describe_completion(args: Namespace) -> str:
    parts = [f"complete: {args.train_iters} iterations"]
    if console.iteration is None:
        parts.append("no iteration was left to train")
    elif console.iteration.loss is not None:
        parts.append(f"loss {console.iteration.loss:.4f}")
    if console.validation is not None:
        parts.append(f"validation loss {console.validation.loss:.4f}")
    newest = read_tracker(args.save) if args.save else None
    saved = f"checkpoint {newest} is in {args.save}" if newest is not None else "no checkpoint was saved"
    return f"{', '.join(parts)}; {saved}"


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
    return RunFailure(f"cannot save a checkpoint to {spaces}; {cause}. {_newest_checkpoint(args)}")


def _describe_space(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    space = "no space is left there" if free < _NO_SPACE else f"{free / 2**30:.1f} GiB are free there"
    return f"{folder}: {space}"


def _newest_checkpoint(args: Namespace) -> str:
    """Return a sentence about the newest checkpoint of the run."""
    newest = read_tracker(args.save) if args.save else None
    local = non_persistent_folder(args, args.save)
    newest_local = newest_sound(local) if local is not None else None
    if newest_local is not None and not (isinstance(newest, int) and newest >= newest_local):
        return f"The newest checkpoint is the non-persistent one of iteration {newest_local}"
    return f"The newest checkpoint is of iteration {newest}" if newest is not None else "There is no checkpoint yet"
