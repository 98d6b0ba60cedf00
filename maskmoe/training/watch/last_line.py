"""The last line of a run, which says how the run ended."""

import time
from argparse import Namespace

from maskmoe.checkpoint.series import read_tracker
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.console import console

_TORCHRUN_DELAY = 0.3  # seconds; torchrun looks every 0.1 s for new lines of each rank


class LastLine(Callback):
    """Prints in one line on the last rank that training is complete, or how to resume; failures explain themselves.

    Args:
        args: Megatron's arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def on_end(self, error: BaseException | None) -> None:
        """Print the line, after the lines that the other ranks have printed."""
        is_stopped = isinstance(error, SystemExit) and error.code in (None, 0, EXIT_REQUEUE)
        if error is None or is_stopped:
            time.sleep(_TORCHRUN_DELAY)
            console.say(_describe_stop(self._args) if is_stopped else _describe_completion(self._args), rank=-1)


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
    if console.validation is not None and console.validation.loss is not None:
        parts.append(f"validation loss {console.validation.loss:.4f}")
    newest = read_tracker(args.save) if args.save else None
    saved = f"checkpoint {newest} is in {args.save}" if newest is not None else "no checkpoint was saved"
    return f"{', '.join(parts)}; {saved}"
