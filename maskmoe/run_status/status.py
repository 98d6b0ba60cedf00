"""The status of a run at one moment: its arguments, how far it is, whether it is alive, and its checkpoints."""

import os
import re
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic_core import to_jsonable_python

from maskmoe.checkpoint.series import non_persistent_folder
from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import ARGUMENTS, Entry, Kind, read_journal
from maskmoe.files.untrusted import UnusableFile, read_bounded
from maskmoe.processes.folder_lock import LOCK_NAME, check_unlocked
from maskmoe.run_status.checkpoints import Checkpoints, find_checkpoints, read_checkpoints
from maskmoe.run_status.events import Logged, find_event_folder, read_events

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

_MOST_SECONDS = 1e11  # the year 5138; damaged files have later times
# The file with the arguments of a run.
_MOST_BYTES = 1 << 24  # a blend of thousands of datasets takes more than 1 MiB
# A path cannot have a null character.
_FOLDER = re.compile(r"# Relative paths are relative to ([^\0]+)")
_ARGUMENT = re.compile(r"# (\w+): ([^\0]*)")
_MOST_DIGITS = 15
# The event files.
_LOSS, _HELD_OUT_LOSS = "lm loss", "lm loss validation"
_MOST_VALUES = 20_000  # of a scalar in one file; more take gigabytes
_RECENT = 100  # values from which the speed is measured
# The journal.
_HISTORY = (Kind.LAUNCHED, Kind.STARTED, Kind.ENDED, Kind.NODES)
_MOST_CHARACTERS = 500  # of a text in the journal
_MEETING_SECONDS = 300.0  # which nodes may take to start the ranks after one of the nodes was lost
# A run without a lock that writes nothing for this time, and for this number of iterations, counts as lost. A start may
# take as long before its first rank locks the folder.
_SILENT_SECONDS = 120.0
_SILENT_ITERATIONS = 10


@dataclass(frozen=True)
class RunArguments:
    """The arguments of the newest start of a run.

    Attributes:
        texts: All arguments of Megatron and MaskMoE by name, as text; empty if the run has written none.
        folder: The folder in which the run was started, to which paths are relative.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @classmethod
    def read(cls, run: Path) -> Self:
        """Return the arguments in the run folder `run`."""
        try:
            lines = read_bounded(run / ARGUMENTS, _MOST_BYTES).decode(errors="replace").splitlines()
        except UnusableFile:
            return cls()
        folder = next((match[1] for line in lines if (match := _FOLDER.fullmatch(line))), "")
        return cls({match[1]: match[2] for line in lines if (match := _ARGUMENT.fullmatch(line))}, Path(folder))

    def get(self, name: str) -> str | None:
        """Return an argument as text; None if the argument is unknown or None."""
        text = self.texts.get(name, "None")
        return None if text == "None" else text

    def number(self, name: str) -> int | None:
        """Return an argument that is a whole number; None if the argument is unknown or anything else."""
        text = self.texts.get(name, "")
        return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None

    def path(self, name: str) -> Path | None:
        """Return an argument that is a folder; None if the argument is unknown or None, or the folder is unreadable."""
        text = self.get(name)
        if text is None:
            return None
        path = self.folder / text
        return path if os.access(path, os.R_OK | os.X_OK) else None


@dataclass(frozen=True)
class Progress:
    """How far a run is; what is unknown is None.

    Attributes:
        iteration: The newest iteration.
        total: The iterations of the whole run.
        loss: The newest loss in nats per token; it may be NaN.
        held_out_iteration: The newest iteration with a loss of held-out text.
        held_out_loss: This loss in nats per token.
        tokens_per_second: The speed of all ranks together over the newest iterations, with evaluation and saving.
        seconds_per_iteration: Mean time between the newest iterations, with evaluation and saving.
    """

    iteration: int | None = None
    total: int | None = None
    loss: float | None = None
    held_out_iteration: int | None = None
    held_out_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_per_iteration: float | None = None

    @classmethod
    def of(cls, logged: Logged, newest: Entry | None, arguments: RunArguments) -> Self:
        """Measure a run.

        Args:
            logged: The scalars of the run.
            newest: The newest entry of the journal's history. An end has the last loss that the run has printed: with
                a `--log-interval` above 1, the mean over the interval, which TensorBoard does not have.
            arguments: The arguments of the run.
        """
        loss, held_out = logged.last(_LOSS), logged.last(_HELD_OUT_LOSS)
        printed_loss = newest.facts.get("loss") if newest else None
        # The training loss is logged only every `--tensorboard-log-interval` iterations.
        steps = [value.step for value in (loss, held_out) if value is not None]
        steps += [newest.iteration] if newest and newest.iteration is not None else []
        recent, seq_length = _recent_losses(logged), arguments.number("seq_length")
        seconds = speed = None
        if len(recent) > 1 and recent[-1].wall_time > recent[0].wall_time:  # unless the clock was set back
            seconds = (recent[-1].wall_time - recent[0].wall_time) / (recent[-1].step - recent[0].step)
            sizes = [each.value for each in logged.scalars.get("batch-size", ()) if each.step > recent[0].step]
            speed = fmean(sizes) * seq_length / seconds if sizes and seq_length is not None else None
        logged_loss = None if loss is None else loss.value
        return cls(
            iteration=max(steps, default=None),
            total=arguments.number("train_iters"),
            loss=printed_loss if isinstance(printed_loss, float) else logged_loss,
            held_out_iteration=None if held_out is None else held_out.step,
            held_out_loss=None if held_out is None else held_out.value,
            tokens_per_second=speed,
            seconds_per_iteration=seconds,
        )

    @property
    def is_complete(self) -> bool:
        """Whether the run has trained all iterations."""
        return self.iteration is not None and self.total is not None and self.iteration >= self.total

    @property
    def seconds_left(self) -> float | None:
        """The time that the remaining iterations need, with evaluation and saving; None if unknown or beyond reason."""
        if self.iteration is None or self.total is None or self.seconds_per_iteration is None:
            return None
        seconds = max(0, self.total - self.iteration) * self.seconds_per_iteration
        return seconds if seconds < _MOST_SECONDS else None


def _recent_losses(logged: Logged) -> Sequence["ScalarEvent"]:
    """Return the newest losses of the newest start, from which the speed is measured."""
    losses = (value for value in logged.scalars.get(_LOSS, ()) if value.wall_time >= (logged.newest_start or 0))
    return [*losses][-_RECENT:]


State = Literal["running", "finished", "ended", "lost", "unknown"]
"""The state of a run.

The processes of a running run work. A finished run has done all iterations and did not fail after them. An ended run
can be started again. A lost run was killed, or its host failed: it left its lock behind, or its journal has no end. The
state is unknown if nothing says whether the run works.
"""


@dataclass(frozen=True)
class Liveness:
    """Whether a run is alive.

    Attributes:
        state: What the run does.
        reason: How this is known, a clause.
        last_sign: When the run last wrote something, in seconds since 1970; None if it has written nothing.
    """

    state: State
    reason: str
    last_sign: float | None = None


def read_liveness(
    lock_folder: Path | None, history: Sequence[Entry], last_sign: float | None, progress: Progress
) -> Liveness:
    """Return whether a run is alive.

    Args:
        lock_folder: The folder of the checkpoints, which a run locks; None if the run has none.
        history: The journal's entries about starts, ends and changes of the nodes, in the order of time.
        last_sign: When the run last wrote something, in seconds since 1970; None if it has written nothing.
        progress: How far the run is.
    """
    lock = None if lock_folder is None or not (lock_folder / LOCK_NAME).exists() else lock_folder
    newest = history[-1] if history else None
    patience = max(_SILENT_SECONDS, _SILENT_ITERATIONS * (progress.seconds_per_iteration or 0))
    is_fresh = last_sign is not None and time.time() - last_sign < patience
    found = partial(Liveness, last_sign=last_sign)
    if lock is not None:
        try:
            check_unlocked(lock)
        except UserError as holder:
            return found("running", str(holder))
    is_open = newest is not None and newest.kind not in (Kind.ENDED, Kind.NODES)
    if lock is None and is_open and is_fresh:
        return found("running", "its journal has no end, and it wrote something a short time ago")
    # The last iteration is logged before its checkpoint is saved, which may fail.
    if newest is not None and newest.kind is Kind.ENDED:
        has_succeeded = newest.facts.get("exit_code") == 0
    else:
        has_succeeded = lock is None and not is_open
    if progress.is_complete and has_succeeded:
        return found("finished", "all iterations are done")
    # After a change of the nodes, the launchers of the remaining nodes start the ranks again.
    if newest is not None and newest.kind is Kind.NODES and time.time() - newest.time < _MEETING_SECONDS:
        return found("running", f"its nodes meet again: {newest.text}")
    if newest is not None and newest.kind is Kind.ENDED:
        return found("ended", newest.text)
    if lock is not None:
        return found("lost", "its process has left its lock behind and is gone")
    if is_open:
        return found("lost", "its journal has no end, but it has written nothing for a while")
    if lock_folder is not None:
        return found("ended", "no process holds the lock")
    return found("running", "it wrote something a short time ago") if is_fresh else found("unknown", "it has no lock")


@dataclass(frozen=True)
class Status:
    """Everything that a run folder says about a run at one moment.

    Attributes:
        name: The name of the run.
        read: When the folder was read, in seconds since 1970.
        liveness: Whether the run is alive.
        progress: How far the run is.
        history: The starts of the run, how they ended, and changes of the nodes, in the order of time.
        warnings: What deserves a look, in the order of time.
        checkpoints: The checkpoints.
        logged: The scalars and texts of the event files; JSON leaves them out.
        arguments: The arguments of the newest start; JSON leaves them out.
    """

    name: str
    read: float
    liveness: Liveness
    progress: Progress
    history: tuple[Entry, ...]
    warnings: tuple[Entry, ...]
    checkpoints: Checkpoints
    logged: Logged
    arguments: RunArguments

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values; these keys are stable, and new keys may be added.

        The keys are the attributes of this class and of the classes of its parts, without `logged` and `arguments`.
        Times are seconds since 1970, sizes are bytes, and what is unknown is null. `progress` also has `seconds_left`,
        and NaN and infinity become null.
        """
        content = {name: value for name, value in vars(self).items() if name not in ("logged", "arguments")}
        progress = {**asdict(self.progress), "seconds_left": self.progress.seconds_left}
        return to_jsonable_python({**content, "progress": progress}, inf_nan_mode="null")


def read_status(run: Path, verify: bool = False) -> Status:
    """Return the status of a run at this moment.

    Args:
        run: The run folder.
        verify: Whether to compare all files of the checkpoints with their digests.

    Raises:
        UserError: The folder is not the folder of a run.
    """
    arguments = RunArguments.read(run)
    logged = read_events(find_event_folder(run, arguments.path("tensorboard_dir")), _MOST_VALUES)
    entries = [_printable(entry) for entry in read_journal(run) if 0 <= entry.time < _MOST_SECONDS]
    folder = find_checkpoints(run, arguments.path("save"))
    history = _history(entries)
    progress = Progress.of(logged, history[-1] if history else None, arguments)
    if progress.iteration is None and not entries and folder is None and not (run / ARGUMENTS).is_file():
        raise UserError(f"{run} is not the folder of a run: it has no event files, journal or checkpoints")
    signs = (logged.newest, entries[-1].time if entries else None)
    last_sign = max((sign for sign in signs if sign is not None and 0 <= sign < _MOST_SECONDS), default=None)
    elsewhere = arguments.get("non_persistent_global_ckpt_dir")
    settings = Namespace(
        non_persistent_ckpt_type=arguments.get("non_persistent_ckpt_type"),
        non_persistent_global_ckpt_dir=elsewhere and arguments.folder / elsewhere,
    )
    frequent = non_persistent_folder(settings, folder)
    names = filter(arguments.get, ("load", "save"))
    places = [os.path.realpath(arguments.folder / arguments.texts[name]) for name in names]
    load = one_line(places[0]) if len(set(places)) > 1 else ""
    return Status(
        name=one_line(run.resolve().name),
        read=time.time(),
        liveness=read_liveness(folder, history, last_sign, progress),
        progress=progress,
        history=history,
        warnings=tuple(entry for entry in entries if entry.kind is Kind.WARNED),
        checkpoints=read_checkpoints(folder, frequent, verify, load),
        logged=logged,
        arguments=arguments,
    )


def _history(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Return the starts of a run, their ends, and changes of the nodes; an end that is reported twice counts once."""
    history: list[Entry] = []
    for entry in (entry for entry in entries if entry.kind in _HISTORY):
        # Ranks, torchrun and the launchers of all nodes report the same end.
        end = (entry.kind, entry.facts.get("exit_code"))
        if not (entry.kind is Kind.ENDED and history and (history[-1].kind, history[-1].facts.get("exit_code")) == end):
            history.append(entry)
    return tuple(history)


def _printable(entry: Entry) -> Entry:
    """Return an entry without control characters, which could change the terminal, and of bounded length."""
    return replace(entry, text=one_line(entry.text[:_MOST_CHARACTERS]), host=one_line(entry.host[:_MOST_CHARACTERS]))
