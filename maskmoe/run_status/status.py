"""The status of a run as lines of text, from what its run folder holds."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from maskmoe.checkpoint.series import choose_checkpoint, has_checkpoint
from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import ARGUMENTS, CHECKPOINTS, TENSORBOARD
from maskmoe.files.untrusted import UnusableFile, read_bounded
from maskmoe.processes.folder_lock import check_unlocked
from maskmoe.run_status.checkpoints import read_checkpoints
from maskmoe.run_status.events import read_scalars

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

_MOST_BYTES = 1 << 24  # of the file of arguments: a blend of thousands of datasets takes more than 1 MiB
_ARGUMENT = re.compile(r"# (\w+): ([^\0]*)")
_FOLDER = re.compile(r"# Relative paths are relative to ([^\0]+)")
_PATHS = ("load", "save", "tensorboard_dir")
_RECENT = 100  # values from which the speed is measured
_MOST_DIGITS = 15


def status_lines(run: Path, verify: bool = False) -> Iterator[str]:
    """Yield the lines of a run's status: progress, whether a process works in the folder, and the checkpoints.

    Args:
        run: The run folder.
        verify: Whether to compare all files of the checkpoints with their digests.

    Raises:
        UserError: The folder is not the folder of a run.
    """
    arguments = read_arguments(run)
    places = {
        name: Path(arguments["folder"], path) for name, path in arguments.items() if name in _PATHS and path != "None"
    }
    own = {"save": run / CHECKPOINTS, "tensorboard_dir": run / TENSORBOARD}
    # A folder in the run folder goes before the one that the arguments name: a copied run names the original's.
    save, events = (path if path.exists() else places.get(name, path) for name, path in own.items())
    scalars = read_scalars(events)
    if not (arguments["folder"] or scalars or has_checkpoint(save)):
        raise UserError(f"{run} is not the folder of a run: it has no {ARGUMENTS}, event files or checkpoints")
    yield f"{one_line(run.resolve().name)}: {_progress(scalars, arguments)}"
    try:
        check_unlocked(save)
        yield "no process works in the folder"
    except UserError as error:
        yield one_line(error).partition(";")[0]
    yield _next_start(save, places)
    for each in read_checkpoints(save, verify):
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.saved))
        yield f"  {each.path.name}  {each.size / 2**20:>10,.1f} MiB  {saved}  {each.state}"


def read_arguments(run: Path) -> dict[str, str]:
    """Return all arguments of the newest start of a run by name, as text.

    The argument `folder` is the folder to which paths are relative; empty if the run has written no arguments.
    """
    try:
        lines = read_bounded(run / ARGUMENTS, _MOST_BYTES).decode(errors="replace").splitlines()
    except UnusableFile:
        lines = []
    arguments = {match[1]: match[2] for line in lines if (match := _ARGUMENT.fullmatch(line))}
    folder = next((match[1] for line in lines if (match := _FOLDER.fullmatch(line))), "." if arguments else "")
    return {**arguments, "folder": folder}


def _next_start(save: Path, places: Mapping[str, Path]) -> str:
    """Return what a restart would load, with the folder of the checkpoints and the paths among the arguments."""
    load, saved = places.get("load"), places.get("save")
    if load and saved and load.resolve() != saved.resolve():
        return f"every start loads from {one_line(load)}"
    try:
        chosen = choose_checkpoint(save).checkpoint
    except UserError as error:
        return f"a restart would be refused: {one_line(error)}"
    return f"a restart loads {chosen.name}" if chosen else "a restart begins at the first iteration"


def _progress(scalars: Mapping[str, Sequence["ScalarEvent"]], arguments: Mapping[str, str]) -> str:
    """Return iteration, losses, speed and remaining time."""
    losses, held_out = scalars.get("lm loss", ()), scalars.get("lm loss validation", ())
    if not losses:
        return "nothing has been logged yet"
    last, recent, text = losses[-1], losses[-_RECENT:], arguments.get("train_iters", "")
    total = int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else 0
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
