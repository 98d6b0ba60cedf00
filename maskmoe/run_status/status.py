"""The status of a run at one moment."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import ARGUMENTS, Entry, Kind, read_journal
from maskmoe.run_status.arguments import RunArguments
from maskmoe.run_status.checkpoints import Checkpoints, find_checkpoints, read_checkpoints
from maskmoe.run_status.liveness import Liveness, read_liveness
from maskmoe.run_status.progress import Progress
from maskmoe.run_status.scalars import Logged, find_event_folder, read_events

_HISTORY = (Kind.LAUNCHED, Kind.STARTED, Kind.ENDED, Kind.NODES)
_LOAD = re.compile(r"moe/expert_load_max_over_mean_layer_(\d{1,6})")
_MOST_CHARACTERS = 500  # of a text in the journal
_MOST_SECONDS = 1e11  # the year 5138; damaged files have later times


@dataclass(frozen=True)
class LayerLoad:
    """The newest load of one MoE layer; what the run has not logged is None.

    Attributes:
        layer: index of the layer, from 0 as in Megatron's tags.
        iteration: the iteration of the values.
        expert: tokens of the busiest expert, divided by the mean of the layer's experts.
        rank: tokens of the busiest expert-parallel rank, divided by the mean of the ranks.
        entropy: entropy of the masked probabilities in nats.
    """

    layer: int
    iteration: int
    expert: float | None
    rank: float | None
    entropy: float | None


@dataclass(frozen=True)
class Status:
    """Everything that a run folder says about a run at one moment.

    Attributes:
        name: the name of the run.
        read: when the folder was read, in seconds since 1970.
        liveness: whether the run is alive.
        progress: how far the run is.
        loads: the load of each MoE layer.
        history: the starts of the run, how they ended, and changes of the nodes, in the order of time.
        warnings: what deserves a look, in the order of time.
        checkpoints: the checkpoints.
        logged: the scalars and texts of the event files; JSON leaves them out.
        arguments: the arguments of the newest start; JSON leaves them out.
    """

    name: str
    read: float
    liveness: Liveness
    progress: Progress
    loads: tuple[LayerLoad, ...]
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
        run: the run folder.
        verify: whether to compare all files of the checkpoints with their digests.

    Raises:
        UserError: the folder is not the folder of a run.
    """
    arguments = RunArguments.read(run)
    logged = read_events(find_event_folder(run, arguments.path("tensorboard_dir")))
    entries = [_printable(entry) for entry in read_journal(run) if 0 <= entry.time < _MOST_SECONDS]
    folder = find_checkpoints(run, arguments.path("save"))
    history = _history(entries)
    progress = Progress.of(logged, history[-1].facts.get("loss") if history else None, arguments)
    if progress.iteration is None and not entries and folder is None and not (run / ARGUMENTS).is_file():
        raise UserError(f"{run} is not the folder of a run: it has no event files, journal or checkpoints")
    signs = (logged.newest, entries[-1].time if entries else None)
    last_sign = max((seconds for seconds in signs if seconds is not None), default=None)
    return Status(
        name=one_line(run.resolve().name),
        read=time.time(),
        liveness=read_liveness(folder, history, last_sign, progress),
        progress=progress,
        loads=_read_loads(logged),
        history=history,
        warnings=tuple(entry for entry in entries if entry.kind is Kind.WARNED),
        checkpoints=read_checkpoints(folder, arguments, verify),
        logged=logged,
        arguments=arguments,
    )


def _read_loads(logged: Logged) -> tuple[LayerLoad, ...]:
    """Return the newest load of each layer in the order of the layers."""
    loads = []
    for tag, values in logged.scalars.items():
        if match := _LOAD.fullmatch(tag):
            names = ("rank_load_max_over_mean", "routing_entropy")
            others = [logged.last(f"moe/{name}_layer_{match[1]}") for name in names]
            # A start on one rank logs no load of ranks; the values of an earlier start do not count.
            newest = values[-1]
            rank, entropy = (each.value if each is not None and each.step == newest.step else None for each in others)
            loads.append(LayerLoad(int(match[1]), newest.step, newest.value, rank, entropy))
    return tuple(sorted(loads, key=lambda load: load.layer))


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
