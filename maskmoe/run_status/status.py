"""The status of a run as lines of text, from what its run folder holds."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from maskmoe.checkpoint.integrity import check_content, check_structure, has_digests
from maskmoe.checkpoint.reading import CheckpointError
from maskmoe.checkpoint.series import checkpoint_path, choose_checkpoint, has_checkpoint, saved_iterations
from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import ARGUMENTS, CHECKPOINTS, TENSORBOARD
from maskmoe.files.untrusted import UnusableFile, read_bounded
from maskmoe.processes.folder_lock import check_unlocked
from maskmoe.run_status.events import read_scalars

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

_MOST_BYTES = 1 << 24  # of the file of arguments: a blend of thousands of datasets takes more than 1 MiB
_TRAIN_ITERS = re.compile(rb"^(?:# )?train_iters: (\d{1,15})$", re.MULTILINE)
_RECENT = 100  # values from which the speed is measured


def status_lines(run: Path, verify: bool = False) -> Iterator[str]:
    """Yield the lines of a run's status: progress, whether a process works in the folder, and the checkpoints.

    Args:
        run: The run folder.
        verify: Whether to compare all files of the checkpoints with their digests.

    Raises:
        UserError: The folder is not the folder of a run.
    """
    save, scalars = run / CHECKPOINTS, read_scalars(run / TENSORBOARD)
    if not ((run / ARGUMENTS).exists() or scalars or has_checkpoint(save)):
        raise UserError(f"{run} is not the folder of a run: it has no {ARGUMENTS}, {TENSORBOARD} or {CHECKPOINTS}")
    yield f"{one_line(run.resolve().name)}: {_progress(scalars, read_train_iters(run))}"
    try:
        check_unlocked(save)
        yield "no process works in the folder"
    except UserError as error:
        yield one_line(error).partition(";")[0]
    yield _next_start(save)
    iterations = sorted(saved_iterations(save), reverse=True)
    for iteration in tqdm(iterations, "verifying", unit="checkpoint", disable=not verify, leave=False):
        path = checkpoint_path(save, iteration)
        yield f"  {path.name}  {checkpoint_state(path, verify)}"


def read_train_iters(run: Path) -> int:
    """Return the number of iterations among the arguments of the newest start of a run; 0 if it is unknown."""
    try:
        match = _TRAIN_ITERS.search(read_bounded(run / ARGUMENTS, _MOST_BYTES))
    except UnusableFile:
        return 0
    return int(match[1]) if match else 0


def checkpoint_state(path: Path, verify: bool) -> str:
    """Return the state of a checkpoint.

    The state is `complete` if all files have their full size, `verified` if the files also have the content that was
    saved, else what is wrong.
    """
    try:
        check_structure(path)
        if verify:
            check_content(path)
    except CheckpointError as error:
        return f"damaged: {one_line(error.fault)}"
    if not has_digests(path):
        return "complete, without digests"
    return "verified" if verify else "complete"


def _next_start(save: Path) -> str:
    """Return what a restart would load from the folder of the checkpoints."""
    try:
        chosen = choose_checkpoint(save).checkpoint
    except UserError as error:
        return f"a restart would be refused: {one_line(error)}"
    return f"a restart loads {chosen.name}" if chosen else "a restart begins at the first iteration"


def _progress(scalars: Mapping[str, Sequence["ScalarEvent"]], total: int) -> str:
    """Return iteration, losses, speed and remaining time of a run of `total` iterations; 0 if unknown."""
    losses, held_out = scalars.get("lm loss", ()), scalars.get("lm loss validation", ())
    if not losses:
        return "nothing has been logged yet"
    last, recent = losses[-1], losses[-_RECENT:]
    parts = [f"iteration {last.step:,}" + (f" of {total:,}" if total else ""), f"loss {last.value:.4f}"]
    if held_out:
        parts.append(f"held-out {held_out[-1].value:.4f} at iteration {held_out[-1].step:,}")
    # The median leaves out evaluations, and the time between two starts.
    if steps := [(b.wall_time - a.wall_time) / (b.step - a.step) for a, b in pairwise(recent)]:
        seconds = median(steps)
        parts.append(f"{seconds:.3g} s an iteration")
        if total > last.step:
            parts.append(f"{timedelta(seconds=round((total - last.step) * seconds))} of training left")
    return ", ".join(parts)
