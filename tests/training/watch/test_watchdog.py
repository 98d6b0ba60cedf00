"""The watchdog blames the right rank."""

import argparse
import sys
import threading
import traceback
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import HashStore

from maskmoe.processes.interruption import is_last_attempt
from maskmoe.training.rank_store import RankStore
from maskmoe.training.settings.arguments import add_pretraining_arguments, hang_timeout
from maskmoe.training.watch import watchdog
from maskmoe.training.watch.watchdog import Sighting, Watchdog, find_culprits, waits_for_others

WAITING = Sighting(
    rank=0, where="host a, process 1", steps=7, at="distributed.py:1 in all_reduce", waits=True, time=3.0
)


def sightings(**of_rank_1) -> list[Sighting]:
    """Return sightings of three ranks that wait for each other; the arguments change the second rank."""
    ranks = [WAITING._replace(rank=rank) for rank in range(3)]
    ranks[1] = ranks[1]._replace(**of_rank_1)
    return ranks


def later(ranks: list[Sighting], but=()) -> list[Sighting]:
    """Return the sightings of all ranks some periods later; the ranks in `but` have reported nothing new."""
    return [seen if seen.rank in but else seen._replace(time=seen.time + 2) for seen in ranks]


@pytest.mark.parametrize(
    ("of_rank_1", "silent", "expected", "words"),
    [
        ({}, [1], [1], ["rank 1 (host a, process 1) shows no sign of life"]),
        ({"waits": False, "at": "loader.py:5 in read"}, [], [1], ["stands still", "loader.py:5 in read"]),
        ({"steps": 6}, [], [1], []),
        ({}, [], [], ["all 3 ranks wait for each other"]),
    ],
    ids=["silent rank", "rank outside a collective", "rank that is behind", "nobody"],
)
def test_culprits(of_rank_1, silent, expected, words):
    before = sightings(**of_rank_1)
    culprits, reason = find_culprits(before, later(before, but=silent))
    assert culprits == expected
    assert all(word in reason for word in words)


def test_many_culprits_are_not_all_named():
    before = [WAITING._replace(rank=rank, waits=False) for rank in range(100)]
    culprits, reason = find_culprits(before, later(before))
    assert len(culprits) == 100
    assert "and 92 more ranks" in reason


class Handle:
    def wait(self):
        return innermost_call(sys._getframe(1))


def innermost_call(frame) -> traceback.FrameSummary:
    return traceback.extract_stack(frame, limit=1)[-1]


def test_waiting_is_told_from_working():
    assert waits_for_others(Handle().wait())
    assert not waits_for_others(innermost_call(sys._getframe()))


def test_threads_end_with_the_run():
    """A thread that outlives the interpreter would abort the process."""
    before = set(threading.enumerate())
    watched = Watchdog(RankStore(HashStore(), 0, 1), timeout=1.0)
    watched.on_start()
    assert len(set(threading.enumerate()) - before) == 2
    assert watched._read()[0].rank == 0  # at once: a rank that has not reported would let the other ranks wait
    watched.on_end(None)
    assert set(threading.enumerate()) <= before


def test_full_disk_does_not_keep_a_hanging_rank_from_ending(monkeypatch):
    monkeypatch.setattr(sys.stderr, "write", Mock(side_effect=OSError))
    Watchdog(RankStore(HashStore(), 0, 1), timeout=1.0)._print([0], "the rank hangs")


@pytest.mark.parametrize(
    ("restarts", "most", "is_last"), [(None, None, True), (0, 0, True), (1, 3, False), (3, 3, True)]
)
def test_last_attempt_of_torchrun(monkeypatch, restarts, most, is_last):
    for name, value in (("TORCHELASTIC_RESTART_COUNT", restarts), ("TORCHELASTIC_MAX_RESTARTS", most)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert is_last_attempt() == is_last


class Stream:
    """A stream of a device, which has work left, is idle, or does not answer (None)."""

    def __init__(self, is_idle: bool | None) -> None:
        self.is_idle = is_idle

    def query(self) -> bool:
        return threading.Event().wait() if self.is_idle is None else self.is_idle


@pytest.mark.parametrize(("is_idle", "waits"), [(True, False), (False, True), (None, True)])
def test_a_rank_that_waits_to_launch_a_kernel_is_not_to_blame(monkeypatch, is_idle: bool | None, waits: bool) -> None:
    monkeypatch.setattr(watchdog, "_QUERY_TIMEOUT", 0.1)
    ranks = RankStore(HashStore(), 0, 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(is_idle))
    watched = Watchdog(ranks, timeout=1e-9)
    watched.before_micro_batch()
    watched._trainer = threading.get_ident()
    watched._report()
    assert watched._read()[0].waits is waits


@pytest.mark.parametrize("minutes", [1, 10, 60])
def test_default_verdict_comes_before_the_distributed_timeout(minutes: int) -> None:
    """NCCL aborts then. A verdict takes six periods: one to notice, three to judge, two to wait for other ranks."""
    parser = add_pretraining_arguments(argparse.ArgumentParser())
    parser.add_argument("--distributed-timeout-minutes", type=int, default=10)
    parser.add_argument("--distributed-timeout-seconds-after-init", type=int)
    args = parser.parse_args(["--distributed-timeout-minutes", str(minutes)])
    timeout = hang_timeout(args)
    period = Watchdog(RankStore(HashStore(), 0, 1), timeout)._period
    assert timeout + 6 * period < 60 * minutes
    assert hang_timeout(parser.parse_args(["--hang-timeout", "7"])) == 7
    assert hang_timeout(parser.parse_args(["--distributed-timeout-seconds-after-init", "40"])) == 20
    assert hang_timeout(parser.parse_args(["--distributed-timeout-seconds-after-init", "4000"])) == 300
