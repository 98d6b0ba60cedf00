"""Prints how far a training run is, and how it ends."""

import time
from argparse import Namespace
from datetime import timedelta

import torch
from megatron.training import is_last_rank
from torch import Tensor

from maskmoe.checkpoint.series import read_tracker
from maskmoe.processes.console import console
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.watch.callback import Callback, Step

LOSS = "lm loss"
_TORCHRUN_DELAY = 0.3  # seconds; torchrun looks every 0.1 s for new lines of each rank


class Progress(Callback):
    """Prints a line for each `--log-interval`, and one line at an orderly end, on the last rank, which has the loss.

    The loss is the mean over the steps since the line before that have updated the weights. The first step has a line
    of its own, without a speed: it compiles kernels and fills caches.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._losses: list[Tensor] = []
        self._tokens = self._skipped = 0
        self._loss: float | None = None  # of the newest line
        self._first = self._newest = (0, 0.0)  # iteration and time of the first and of the newest line

    def after_step(self, step: Step) -> None:
        """Take a step, and print a line if one is due."""
        if not is_last_rank():
            return
        self._tokens += step.samples * self._args.seq_length
        if step.has_updated:
            self._losses.append(step.losses[LOSS].detach())
        else:
            self._skipped += 1
        is_first = not self._first[0]
        if not is_first and step.iteration % self._args.log_interval:
            return
        self._loss = float(torch.stack(self._losses).mean()) if self._losses else None
        now = step.iteration, time.monotonic()
        if is_first:
            self._first = self._newest = now
        self._print(*now)
        self._newest = now
        self._losses, self._tokens, self._skipped = [], 0, 0

    def _print(self, iteration: int, now: float) -> None:
        """Print the line of an iteration."""
        total = self._args.train_iters
        parts = [f"iteration {iteration}/{total} ({iteration / total:.0%})"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        first, start = self._first
        if iteration > first:
            seconds_left = (now - start) / (iteration - first) * (total - iteration)
            parts.append(f"{self._tokens / (now - self._newest[1]):,.0f} tokens/s")
            parts.append(f"{timedelta(seconds=round(seconds_left))} left")
        if self._skipped:
            parts.append(f"{self._skipped} steps without an update")
        console.say("  ".join(parts), rank=-1)

    def on_end(self, error: BaseException | None) -> None:
        """Print the last line, after the lines that the other ranks have printed; a failure explains itself."""
        is_stopped = isinstance(error, SystemExit) and error.code in (None, 0, EXIT_REQUEUE)
        if error is not None and not is_stopped:
            return
        time.sleep(_TORCHRUN_DELAY)
        args = self._args
        newest = read_tracker(args.save) if args.save else None
        if is_stopped:
            saved = f"saved iteration {newest} in {args.save}; the same command resumes"
            line = f"stopped: {'no checkpoint was saved' if newest is None else saved}"
        else:
            loss = "" if self._loss is None else f", loss {self._loss:.4f}"
            saved = "no checkpoint was saved" if newest is None else f"checkpoint {newest} is in {args.save}"
            line = f"complete: {args.train_iters} iterations{loss}; {saved}"
        console.say(line, rank=-1)
