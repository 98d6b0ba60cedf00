"""Writes the start of a run into the run folder: the log, the arguments and an entry of the journal."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskmoe.files.run_folder import ARGUMENTS, Journal, Kind
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load
from maskmoe.training.settings.layout import Layout, training_iterations
from maskmoe.training.settings.saved_arguments import save_arguments
from maskmoe.training.watch.callback import Callback
from maskmoe.training.watch.console import console
from maskmoe.training.watch.header import describe_layout, describe_start


class RunStart(Callback):
    """Opens the log of each rank and, on the first rank, writes the arguments and an entry of the journal.

    A refused run leaves no files, so this happens when the model is built: no rank refuses the run any more.

    Args:
        args: Megatron's validated arguments.
        folder: The run folder, or None if there is none.
    """

    def __init__(self, args: Namespace, folder: Path | None) -> None:
        self._args = args
        self._folder = folder

    def on_model_built(self, chunks: Sequence[Any]) -> None:
        """Write the files."""
        console.open_log(self._folder)
        console.shows_timers = self._args.timing_log_level > 0
        if self._folder is not None and self._args.rank == 0:
            # Megatron computes the number of iterations from --train-samples later, so add the number here.
            complete = Namespace(**vars(self._args) | {"train_iters": training_iterations(self._args)})
            try:
                save_arguments(complete, sys.argv[1:], self._folder)
            except OSError as error:
                console.say(f"note: cannot write {self._folder / ARGUMENTS}: {error.strerror}")
            _record_start(self._args, self._folder)


def _record_start(args: Namespace, folder: Path) -> None:
    """Write the start of the ranks into the run's journal."""
    layout = Layout.from_args(args)
    Journal(folder).write(
        Kind.STARTED,
        f"{describe_layout(layout)}; {describe_start(args)}",
        args.ckpt_step if checkpoint_to_load(args) else 0,
        ranks=layout.ranks,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )
