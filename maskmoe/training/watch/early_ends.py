"""Early ends of a training run: by a signal, and by a failure, which one line explains."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import rerun_state_machine
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint.saver import SaveError, describe_failures
from maskmoe.checkpoint.series import read_tracker
from maskmoe.checkpoint.writers import rank_is_ending
from maskmoe.errors import RunFailure
from maskmoe.megatron_compat.globals import get_signal_handler
from maskmoe.processes.interruption import EXIT_REQUEUE, SIGNALS_THAT_SAVE
from maskmoe.training.resume.find_checkpoint import checkpoint_to_load
from maskmoe.training.watch.callback import Callback, Step

# Megatron exits with one of these codes after it has repeated a step with a loss or gradient of NaN or infinity.
_RERUN_CODES = (
    rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE,
)
_NO_SPACE = 1 << 20  # bytes


class SaveOnSignals(Callback):
    """Makes Megatron save a checkpoint on every signal of `SIGNALS_THAT_SAVE`, not only on `--exit-signal`.

    Before the first iteration there is nothing to save, and a rank that waits for other ranks handles no signals. So
    until then, `--exit-signal`, with which torchrun ends ranks, ends the process at once.
    """

    def __init__(self, args: Namespace) -> None:
        self._exit_signal = args.exit_signal if args.exit_signal_handler else None
        if self._exit_signal is not None:
            self._save = signal.getsignal(self._exit_signal)
            for number in SIGNALS_THAT_SAVE:
                signal.signal(number, self._save)
            signal.signal(self._exit_signal, signal.SIG_DFL)

    def before_micro_batch(self) -> None:
        """Let `--exit-signal` save, too, from the first micro-batch on."""
        if self._exit_signal is not None:
            signal.signal(self._exit_signal, self._save)
            self._exit_signal = None


class FiniteStepCheck(Callback):
    """Checks the norm of the reduced gradients, because Megatron checks gradients before ranks reduce them.

    Also checks losses that Megatron does not: of the first step of a process, and of all steps with
    `--no-check-for-nan-in-loss-and-grad`.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._checks_loss = True

    def after_step(self, step: Step) -> None:
        """Raise `RunFailure` if the loss or gradient norm of any rank is NaN or infinite; a collective call."""
        losses = step.losses.values() if self._checks_loss else ()
        self._checks_loss = not self._args.check_for_nan_in_loss_and_grad
        values = [float(value) for value in (*losses, step.grad_norm) if value is not None]
        is_bad = step.has_updated and not all(map(math.isfinite, values))
        # Only the last pipeline stage has the loss.
        is_bad_on_any = torch.tensor(int(is_bad), device=torch.cuda.current_device())
        torch.distributed.all_reduce(is_bad_on_any, op=torch.distributed.ReduceOp.MAX)
        if is_bad_on_any:
            raise RunFailure(
                f"the loss or gradient of iteration {self._args.curr_iteration + 1} was NaN or infinite, and "
                "Megatron did not repeat the iteration, so nothing is saved: start the run again, if possible on other "
                "devices; if this happens again, look for the fault in the data and the model. "
                f"{describe_newest_checkpoint(self._args)}"
            )


@contextmanager
def report_early_end(args: Namespace) -> Iterator[None]:
    """Raise a failed save or load as `RunFailure`, and end the workers of the data loaders.

    If the block ends by a signal, or early because of `--exit-duration-in-mins`, Megatron's exit code 0 becomes
    `EXIT_REQUEUE`.
    """
    try:
        yield
    except SaveError as error:
        cause = str(error)
        # Megatron's writer may hide the system's error.
        if os.path.exists(args.save) and shutil.disk_usage(args.save).free < _NO_SPACE:
            cause = f"no space is left in {args.save}: make space, and start the run again"
        raise RunFailure(
            f"cannot save a checkpoint to {args.save}: {cause}. {describe_newest_checkpoint(args)}"
        ) from error
    except CheckpointException as error:
        raise RunFailure(
            f"cannot load {checkpoint_to_load(args)}: {describe_failures(error)}; remove the cause and start the run "
            "again"
        ) from error
    except SystemExit as end:
        if end.code in _RERUN_CODES and torch.distributed.get_rank() == 0:
            cause = "a loss or gradient was NaN or infinite, and the log says whether again when the step was repeated"
            print(f"error: {cause}. {describe_newest_checkpoint(args)}", file=sys.stderr)
        has_signal = args.exit_signal_handler and any(get_signal_handler().signals_received())
        is_out_of_time = args.exit_duration_in_mins and args.curr_iteration + 1 < args.train_iters
        if not end.code and (has_signal or is_out_of_time):
            sys.exit(EXIT_REQUEUE)
        raise
    finally:
        _kill_workers()


def _kill_workers() -> None:
    """Kill the workers of the data loaders, for which Python would wait forever: Megatron's ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a failed worker
    rank_is_ending.set()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def describe_newest_checkpoint(args: Namespace) -> str:
    """Return a sentence about the newest checkpoint of the run."""
    newest = read_tracker(args.save) if args.save else None
    return "There is no checkpoint yet" if newest is None else f"The newest checkpoint is of iteration {newest}"
