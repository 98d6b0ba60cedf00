"""The status of a run at one moment."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic_core import to_jsonable_python

from maskmoe.launch.journal import Entry
from maskmoe.run_report.history import Curve
from maskmoe.run_report.progress import Progress
from maskmoe.run_status.checkpoints import Checkpoints
from maskmoe.run_status.liveness import Liveness
from maskmoe.run_status.load import LayerLoad
from maskmoe.run_status.starts import RunStart


@dataclass(frozen=True)
class Status:
    """Everything that a run folder says about a run at one moment.

    Attributes:
        name: the name of the run.
        read: when the folder was read, in seconds since 1970.
        liveness: whether the run is alive.
        progress: how far the run is.
        loads: the load of each MoE layer.
        starts: the starts of the run in the order of time.
        warnings: what deserves a look, in the order of time.
        nodes: what happened to the nodes, in the order of time.
        last_save: the journal's newest entry about a checkpoint; None without one.
        checkpoints: the checkpoints.
        num_not_finite: number of logged values that are NaN or infinite.
        curves: the curves of all scalars by tag; JSON leaves them out.
        seq_length: tokens in a sample; None if unknown.
    """

    name: str
    read: float
    liveness: Liveness
    progress: Progress
    loads: tuple[LayerLoad, ...]
    starts: tuple[RunStart, ...]
    warnings: tuple[Entry, ...]
    nodes: tuple[Entry, ...]
    last_save: Entry | None
    checkpoints: Checkpoints
    num_not_finite: int
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False, compare=False)
    seq_length: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values; these keys are stable, and new keys may be added.

        The keys are the attributes of this class and of the classes of its parts, without `curves`. Times are seconds
        since 1970, sizes are bytes, and what is unknown is null. `progress` also has `seconds_left`, and NaN and
        infinity become null.
        """
        content = {name: value for name, value in self.__dict__.items() if name != "curves"}
        progress = {**asdict(self.progress), "seconds_left": self.progress.seconds_left}
        return to_jsonable_python({**content, "progress": progress}, inf_nan_mode="null")
