"""Reads the starts of a run, and how they ended, from the journal and the event files."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from maskmoe.launch.journal import Entry, Kind
from maskmoe.run_report.history import Start

_SECONDS_OF_CLOCKS = 1.0  # the clocks of two hosts may differ so much
_WITHOUT_END = "the processes were killed, or a host failed"


@dataclass(frozen=True)
class RunStart:
    """One start of a run; what is unknown is None.

    Attributes:
        began: when the ranks began to train, or when the launcher started them if they have not begun, in seconds since
            1970.
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
    drafts = _drafts(entries)
    recorded = [draft.finish(is_last=draft is drafts[-1]) for draft in drafts]
    for number, start in enumerate(recorded):
        following = [other.began for other in recorded[number + 1 :] if other.began is not None]
        own = [each for each in logged if _is_within(each, start.began, min(following, default=None))]
        if own:
            recorded[number] = replace(
                start,
                first_iteration=min(each.first_step for each in own),
                last_iteration=max([start.last_iteration or 0, *(each.last_step for each in own)]),
            )
    first = next((start.began for start in recorded if start.began is not None), None)
    unrecorded = [
        RunStart(each.seconds, None, each.first_step, each.last_step)
        for each in logged
        if first is None or (each.seconds is not None and each.seconds < first - _SECONDS_OF_CLOCKS)
    ]
    return (*unrecorded, *recorded)


@dataclass
class _Draft:
    """The entries of one start.

    Attributes:
        began: the entry of the first rank; None if the ranks have not begun to train, or the journal has lost it.
        launched: the entry of the launcher; None without a launcher, and after torchrun has started the ranks again.
        ends: the entries of the launchers of all nodes.
        nodes: changes of the nodes after the beginning.
    """

    began: Entry | None
    launched: Entry | None = None
    ends: list[Entry] = field(default_factory=list)
    nodes: list[Entry] = field(default_factory=list)

    @property
    def is_starting(self) -> bool:
        """Whether the ranks of the launcher may still begin to train."""
        return self.launched is not None and self.began is None and not self.ends

    def finish(self, is_last: bool) -> RunStart:
        """Return the start.

        Args:
            is_last: whether the start may still work if its end is missing.
        """
        # A launcher that only notices that another node has failed may report a success, or report later.
        failed = [entry for entry in self.ends if _exit_code(entry)]
        end = next(iter(failed or self.ends), None)
        code = None if end is None else _exit_code(end)
        causes = [entry.text for entry in self.nodes[:2]]
        if end is not None:
            number = f" with exit code {code}" if code and str(code) not in end.text else ""
            causes = [f"{end.text or 'ended'}{number}", *(causes if code else [])]
        elif is_last:
            causes = []
        else:
            causes = [_WITHOUT_END, *causes]
        first = self.began or self.launched
        return RunStart(
            began=None if first is None else first.time,
            ended=None if end is None else end.time,
            last_iteration=None if end is None else end.iteration,
            text=first.text if first else "",
            end="; ".join(causes),
            exit_code=code,
            is_recorded=True,
        )


def _drafts(entries: Sequence[Entry]) -> list[_Draft]:
    drafts: list[_Draft] = []
    for entry in entries:
        if entry.kind is Kind.LAUNCHED:
            drafts.append(_Draft(began=None, launched=entry))
        elif entry.kind is Kind.STARTED:
            if drafts and drafts[-1].is_starting:
                drafts[-1].began = entry
            else:
                drafts.append(_Draft(entry))
        elif entry.kind is Kind.ENDED:
            if not drafts:
                drafts.append(_Draft(None))
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
    is_before_next = following is None or logged.seconds < following - _SECONDS_OF_CLOCKS
    return logged.seconds >= began - _SECONDS_OF_CLOCKS and is_before_next
