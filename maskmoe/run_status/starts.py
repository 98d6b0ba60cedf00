"""Reads the starts of a run, and how they ended, from the journal and the event files."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from maskmoe.command_line import one_line
from maskmoe.journal import Entry, Kind
from maskmoe.run_report.history import Start

_SECONDS_BETWEEN_NODES = 120.0  # within which the nodes of one start begin
_WITHOUT_END = "no record of its end: the processes were killed, or a host failed"


@dataclass(frozen=True)
class RunStart:
    """One start of a run; what is unknown is None.

    Attributes:
        began: when the ranks began to train, in seconds since 1970.
        ended: when they ended.
        first_iteration: the first iteration that this start has logged.
        last_iteration: the last iteration that this start has logged.
        text: what has started, in words.
        end: how the start has ended, in words; empty if it has not ended.
        exit_code: the exit code of the ranks.
        is_recorded: whether the journal has this start.
    """

    began: float | None = None
    ended: float | None = None
    first_iteration: int | None = None
    last_iteration: int | None = None
    text: str = ""
    end: str = ""
    exit_code: int | None = None
    is_recorded: bool = False


def read_starts(entries: Sequence[Entry], logged: Sequence[Start]) -> tuple[RunStart, ...]:
    """Return the starts of a run in the order of time.

    Args:
        entries: the journal in the order of time.
        logged: what each start has logged.
    """
    recorded = [draft.finish() for draft in _drafts(entries)]
    # A start of which only the end is missing has ended when the next one began.
    recorded = [
        start if start.end or number == len(recorded) - 1 else replace(start, end=_WITHOUT_END)
        for number, start in enumerate(recorded)
    ]
    starts = [*recorded]
    for number, start in enumerate(recorded):
        following = [other.began for other in recorded[number + 1 :] if other.began is not None]
        own = [each for each in logged if _is_within(each, start.began, min(following, default=None))]
        if own:
            starts[number] = replace(
                start,
                first_iteration=min(each.first_step for each in own),
                last_iteration=max([start.last_iteration or 0, *(each.last_step for each in own)]),
            )
    first = next((start.began for start in recorded if start.began is not None), None)
    unrecorded = [
        RunStart(each.seconds, None, each.first_step, each.last_step)
        for each in logged
        if first is None or (each.seconds is not None and each.seconds < first)
    ]
    return (*unrecorded, *starts)


@dataclass
class _Draft:
    """The entries of one start."""

    began: Entry | None
    hosts: set[str]
    ends: list[Entry] = field(default_factory=list)
    nodes: list[Entry] = field(default_factory=list)

    def is_joined_by(self, entry: Entry) -> bool:
        """Return whether an entry reports the same start on another node."""
        return (
            self.began is not None
            and not self.ends
            and entry.host not in self.hosts
            and entry.time - self.began.time < _SECONDS_BETWEEN_NODES
        )

    def finish(self) -> RunStart:
        """Return the start."""
        # Nodes that only notice that another node has failed report later.
        failed = [entry for entry in self.ends if _exit_code(entry)]
        end = next(iter(failed or self.ends), None)
        code = None if end is None else _exit_code(end)
        words = [] if end is None else [end.text or "ended", *([] if code is None else [f"exit code {code}"])]
        if end is None or code:
            words += [entry.text for entry in self.nodes[-2:]]
        return RunStart(
            began=None if self.began is None else self.began.time,
            ended=None if end is None else end.time,
            last_iteration=None if end is None else end.iteration,
            text=one_line(self.began.text) if self.began else "",
            end=one_line("; ".join(words)),
            exit_code=code,
            is_recorded=True,
        )


def _drafts(entries: Sequence[Entry]) -> list[_Draft]:
    drafts: list[_Draft] = []
    for entry in entries:
        if entry.kind is Kind.STARTED:
            if drafts and drafts[-1].is_joined_by(entry):
                drafts[-1].hosts.add(entry.host)
            else:
                drafts.append(_Draft(entry, {entry.host}))
        elif entry.kind is Kind.ENDED:
            if not drafts:
                drafts.append(_Draft(None, set()))
            drafts[-1].ends.append(entry)
        elif entry.kind is Kind.NODES and drafts:
            drafts[-1].nodes.append(entry)
    return drafts


def _exit_code(entry: Entry) -> int | None:
    code = entry.facts.get("exit_code")
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def _is_within(logged: Start, began: float | None, following: float | None) -> bool:
    """Return whether a start has logged its first value between the beginnings of two starts of the journal."""
    if logged.seconds is None or began is None:
        return False
    return logged.seconds >= began - 1 and (following is None or logged.seconds < following - 1)
