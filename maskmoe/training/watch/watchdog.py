"""Ends a run in which a rank hangs, and names that rank.

A rank that hangs stops all other ranks, which wait for it in a collective. So the rank to blame is a rank that shows no
sign of life, or a rank that stands still outside of a collective.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn

import torch

from maskmoe.processes.interruption import EXIT_HANG, is_last_attempt, leave_exit_code
from maskmoe.training.rank_store import RankStore
from maskmoe.training.watch.callback import Callback

_WAITING_PACKAGES = tuple(f"{os.path.dirname(torch.__file__)}/{package}/" for package in ("distributed", "autograd"))
# Calls in which Python waits for the result of a collective, or for a GPU that is in a collective.
_WAITING_CALLS = (".wait(", "barrier(", ".synchronize(", ".item(", ".cpu(", ".tolist(")
_MAX_NAMED_RANKS = 8
_JOIN_TIMEOUT = 5.0  # seconds
_QUERY_TIMEOUT = 1.0  # seconds


class Sighting(NamedTuple):
    """The state of a rank, as its watchdog reports it.

    Attributes:
        where: Host and process of the rank, for the message.
        steps: Number of micro-batches that the rank has begun.
        at: Innermost Python call of the training thread, for the message.
        waits: Whether this call waits for other ranks, or for a device that is busy.
        time: When the rank reported this, in seconds on a clock of its own.
    """

    rank: int
    where: str
    steps: int
    at: str
    waits: bool
    time: float


class Watchdog(Callback):
    """Watches over this rank in a thread of its own, and reports the rank's state to the watchdogs of other ranks.

    If the rank begins no micro-batch for `timeout` seconds, the watchdog prints which rank is to blame and ends the
    process with `EXIT_HANG`. The first watchdog that reaches a verdict shares it, so that all ranks end. Time counts
    from the first micro-batch: everything before has timeouts of its own.
    """

    _stream: torch.cuda.Stream  # of the latest micro-batch

    def __init__(self, ranks: RankStore, timeout: float) -> None:
        self._timeout = timeout
        self._period = min(timeout / 10, 10.0)
        self._ranks = ranks.beside()
        self._trainer = threading.get_ident()
        self._steps = 0
        self._last_step: float | None = None
        self._last_contact = time.monotonic()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._watch, self._guard)]

    def on_start(self) -> None:
        """Report this rank, so that `_read` finds a sighting of each rank, and start the threads of the watchdog."""
        self._report()
        for thread in self._threads:
            thread.start()

    def on_end(self, error: BaseException | None) -> None:
        """End the threads: a thread that waits for the store while the interpreter exits would abort the process."""
        self._last_step = None
        self._is_over.set()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT)

    def before_micro_batch(self) -> None:
        """Note that a micro-batch begins."""
        self._steps += 1
        self._stream = torch.cuda.current_stream()
        self._last_step = time.monotonic()

    def before_save(self) -> None:
        """Do not count time during work of any length until the next micro-batch begins."""
        self._last_step = None

    before_wait = before_save

    def _watch(self) -> None:
        while not self._is_over.wait(self._period):
            try:
                self._report()
                verdict = self._ranks.peek("verdict")
                if verdict is None and self._stands_still():
                    verdict = self._judge()
            except RuntimeError:  # the connection to the store broke, which `_guard` handles
                return
            if verdict is not None:
                self._print(*json.loads(verdict))
                self._ranks.wait_until_known("verdict", 2 * self._period)
                _end()
            self._last_contact = time.monotonic()

    def _guard(self) -> None:
        """End this rank if the store does not answer because its host hangs; without torchrun the host is rank 0."""
        while not self._is_over.wait(self._period):
            silence = time.monotonic() - self._last_contact
            if self._stands_still() and silence > max(self._timeout, 8 * self._period):
                self._print([], f"no micro-batch was begun, and the store of the ranks was silent, for {silence:.0f} s")
                _end()

    def _stands_still(self) -> bool:
        last_step = self._last_step
        return last_step is not None and time.monotonic() - last_step > self._timeout

    def _report(self) -> None:
        call = traceback.extract_stack(sys._current_frames()[self._trainer], limit=1)[-1]
        where = f"host {socket.gethostname()}, process {os.getpid()}"
        at = f"{call.filename}:{call.lineno} in {call.name}"
        rank = self._ranks.rank
        waits = waits_for_others(call) or (self._stands_still() and is_busy(self._stream))
        sighting = Sighting(rank, where, self._steps, at, waits, time.monotonic())
        self._ranks.store.set(f"sighting/{rank}", json.dumps(sighting))

    def _judge(self) -> str | None:
        """Return the verdict of this rank or of a faster rank; None if training continues after all."""
        before = self._read()
        for _ in range(3):
            self._is_over.wait(self._period)
            self._report()
        if not self._stands_still():
            return None
        culprits, reason = find_culprits(before, self._read())
        message = f"no micro-batch was begun for {self._timeout:g} s: {reason}"
        return self._ranks.store.compare_set("verdict", "", json.dumps([culprits, message])).decode()

    def _read(self) -> list[Sighting]:
        return [Sighting(*json.loads(message)) for message in self._ranks.read_all("sighting")]

    def _print(self, culprits: list[int], message: str) -> None:
        with suppress(OSError):  # a full disk must not keep this process from ending
            if self._ranks.rank in culprits or os.environ.get("LOCAL_RANK", "0") == "0" or not culprits:
                print(f"error: {message}", file=sys.stderr)
            if self._ranks.rank in culprits or not culprits:
                stack = "".join(traceback.format_stack(sys._current_frames()[self._trainer]))
                print(f"rank {self._ranks.rank} stands at\n{stack}", file=sys.stderr)
            sys.stderr.flush()


def _end() -> NoReturn:
    """End the process at once, with `EXIT_HANG`."""
    if is_last_attempt():
        leave_exit_code(EXIT_HANG)
    os._exit(EXIT_HANG)


def find_culprits(before: Sequence[Sighting], after: Sequence[Sighting]) -> tuple[list[int], str]:
    """Return the ranks that hold up the run, which may be none, and a sentence about them.

    Both arguments have a sighting of each rank, ordered by rank, and some periods lie between them.
    """
    times = {seen.rank: seen.time for seen in before}
    most_steps = max((seen.steps for seen in after), default=0)
    suspects = {
        "shows no sign of life; it was last seen at": [s for s in after if times.get(s.rank) == s.time],
        "stands still while the others wait for it, at": [s for s in after if not s.waits],
        "is behind the others, at": [s for s in after if s.steps < most_steps],
    }
    for what, culprits in suspects.items():
        if culprits:
            named = [f"rank {seen.rank} ({seen.where}) {what} {seen.at}" for seen in culprits[:_MAX_NAMED_RANKS]]
            if len(culprits) > len(named):
                named.append(f"and {len(culprits) - len(named)} more ranks")
            return [seen.rank for seen in culprits], "; ".join(named)
    return [], f"all {len(after)} ranks wait for each other; where each stands follows"


def waits_for_others(call: traceback.FrameSummary) -> bool:
    """Report whether the innermost Python call of a rank waits for other ranks."""
    return call.filename.startswith(_WAITING_PACKAGES) or any(wait in (call.line or "") for wait in _WAITING_CALLS)


def is_busy(stream: torch.cuda.Stream) -> bool:
    """Report whether a stream has work left, such as a collective: any Python call then waits to launch a kernel.

    A launch that waits can block other calls of the driver, so a thread of its own asks; without an answer, it is busy.
    """
    idle = threading.Event()
    threading.Thread(target=lambda: stream.query() and idle.set(), daemon=True).start()
    return not idle.wait(_QUERY_TIMEOUT)
