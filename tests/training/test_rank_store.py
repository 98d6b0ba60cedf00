"""Ranks that torchrun has restarted meet each other, not messages of earlier attempts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import Mock

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from maskmoe.errors import RunFailure, UserError
from maskmoe.training import rank_store
from maskmoe.training.rank_store import RankStore, _meet, sharing_failures

WORLD_SIZE = 3


@pytest.fixture
def server():
    """Host a store that outlives the ranks, as a launcher does."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def connect(server: TCPStore) -> TCPStore:
    return TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=20))


def meet(server: TCPStore, ranks=range(WORLD_SIZE)) -> list[str]:
    """Let ranks meet in threads, and return the session of each."""
    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        return list(pool.map(lambda rank: _meet(connect(server), rank, WORLD_SIZE), ranks))


def test_every_attempt_has_a_session_of_its_own(server):
    sessions = [meet(server) for _ in range(4)]
    assert all(len(set(attempt)) == 1 for attempt in sessions)
    assert len({attempt[0] for attempt in sessions}) == 4


@pytest.mark.parametrize("early", [0, 1])
def test_ranks_that_died_before_they_met(server, early):
    """One rank of an attempt has started and died before the next attempt starts."""
    connect(server).set(f"hello/{early}", "of a process that is gone")
    assert len(set(meet(server))) == 1


def test_late_rank_is_waited_for(server):
    """The first rank believes a message of an earlier attempt until the new rank writes its own."""
    meet(server)
    sessions = {}

    def join(rank: int) -> None:
        sessions[rank] = _meet(connect(server), rank, WORLD_SIZE)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(WORLD_SIZE)]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(timeout=1)
    assert threads[0].is_alive()
    threads[2].start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(sessions) == WORLD_SIZE
    assert len(set(sessions.values())) == 1


def test_messages(server):
    ranks = [RankStore(PrefixStore("session", connect(server)), rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        assert list(pool.map(lambda store: store.gather("names", str(store.rank)), ranks)) == [["0", "1", "2"]] * 3
        assert list(pool.map(lambda store: store.broadcast("word", f"of {store.rank}"), ranks)) == ["of 0"] * 3
    assert ranks[1].peek("verdict") is None
    assert [one.store.compare_set("verdict", "", str(one.rank)) for one in ranks[1:]] == [b"1", b"1"]
    assert ranks[0].beside().peek("verdict") == "1"


def test_messages_of_all_ranks_take_few_requests():
    """Thousands of ranks ask one store at the same time."""
    store, names = Mock(wraps=HashStore()), [str(rank) for rank in range(1000)]
    for rank in names:
        store.set(f"names/{rank}", rank)
    store.add("names/ranks", 999)
    assert RankStore(store, 0, 1000).gather("names", "0") == names
    assert len(store.method_calls) < 1010


def test_single_rank():
    alone = RankStore(HashStore(), 0, 1)
    assert alone.gather("names", "me") == ["me"]
    assert alone.broadcast("word", "mine") == "mine"
    assert alone.beside().peek("verdict") is None
    alone.store.set("verdict", "guilty")
    assert alone.beside().peek("verdict") == "guilty"
    assert alone.for_process_groups is None


def test_ranks_wait_until_the_last_one_calls(server):
    ranks = [RankStore(connect(server), rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    threads = [threading.Thread(target=rank.wait_for_all, args=("checks",)) for rank in ranks]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(timeout=0.5)
    assert all(thread.is_alive() for thread in threads[:2])
    threads[2].start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("failure", "raised"), [(UserError, UserError), (ValueError, RunFailure)])
def test_failure_of_one_rank_is_raised_by_all_ranks_that_wait(server, monkeypatch, failure, raised):
    ranks = [RankStore(connect(server), rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    monkeypatch.setattr(RankStore, "of_process", ranks[1])
    monkeypatch.setenv("RANK", "1")
    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        waiting = [pool.submit(ranks[0].wait_for_all, "checks"), pool.submit(ranks[2].broadcast, "word")]
        with pytest.raises(failure, match=r"^no data$"), sharing_failures():
            raise failure("no data")
        for rank in waiting:
            with pytest.raises(raised, match=r"^no data \(rank 1 on host .+\)$"):
                rank.result(timeout=20)


def test_failure_is_raised_if_the_store_has_ended(monkeypatch):
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(RankStore, "of_process", RankStore(connect(server), 0, WORLD_SIZE))
    del server
    with pytest.raises(UserError, match=r"^no data$"), sharing_failures():
        raise UserError("no data")


@pytest.fixture
def rank_1_of_3(server, monkeypatch):
    """This process is a rank that has not met the others yet."""
    monkeypatch.setattr(RankStore, "of_process", None)
    monkeypatch.setattr(rank_store, "_LATE_START", 0.5)
    variables = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    for name, value in (variables | {"MASTER_PORT": str(server.port)}).items():
        monkeypatch.setenv(name, value)


def test_refusal_before_the_ranks_have_met_reaches_ranks_that_wait(server, rank_1_of_3):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_meet, connect(server), 0, WORLD_SIZE)
        with pytest.raises(UserError, match=r"^no flag$"), sharing_failures():
            raise UserError("no flag")
        with pytest.raises(UserError, match=r"^no flag \(rank 1 on host .+\)$"):
            waiting.result(timeout=20)


def test_refusing_rank_waits_for_ranks_that_start_later(server, rank_1_of_3, monkeypatch):
    """Torchrun's store may end with the refusing rank."""
    monkeypatch.setattr(rank_store, "_LATE_START", 20)

    def refuse() -> None:
        with sharing_failures():
            raise UserError("no flag")

    with ThreadPoolExecutor(3) as pool:
        refusing = pool.submit(refuse)
        early = pool.submit(_meet, connect(server), 0, WORLD_SIZE)
        with pytest.raises(TimeoutError):
            early.result(timeout=0.5)
        assert not refusing.done()
        late = pool.submit(_meet, connect(server), 2, WORLD_SIZE)
        for rank in (refusing, early, late):
            assert isinstance(rank.exception(timeout=10), UserError)


def test_failure_before_the_ranks_have_met_is_not_shared(server, rank_1_of_3):
    """Torchrun may restart the rank."""
    with pytest.raises(ValueError, match="no data"), sharing_failures():
        raise ValueError("no data")
    assert len(set(meet(server))) == 1


def test_waiting_rank_says_for_whom(server, rank_1_of_3, monkeypatch):
    said = []
    monkeypatch.setattr(rank_store.console, "say", lambda line, rank: said.append((line, rank)))
    monkeypatch.setattr(rank_store, "_PATIENCE", 0.1)
    monkeypatch.setattr(rank_store, "_TIMEOUT", timedelta(seconds=0.5))
    with pytest.raises(RunFailure, match=r"missing are 2 of 3 ranks: 0, 2$"):
        _meet(connect(server), 1, WORLD_SIZE)
    assert said == [("waiting for 2 of 3 ranks: 0, 2", 1)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "5", "RANK=5 is not one of the ranks 0 to 2 of WORLD_SIZE=3"),
        ("RANK", "x", "RANK=x of WORLD_SIZE=3"),
        ("WORLD_SIZE", "0", "RANK=1 of WORLD_SIZE=0"),
        ("MASTER_PORT", "99999999", "MASTER_PORT=99999999 is not a port"),
        ("GLOO_SOCKET_IFNAME", "nope", "this host has no network interface nope"),
    ],
)
def test_variables_that_no_run_can_have(rank_1_of_3, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        RankStore.from_environment()


def test_missing_interface_of_the_only_rank(monkeypatch):
    """Gloo would fail with a traceback, also without other ranks."""
    monkeypatch.setattr(RankStore, "of_process", None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    with pytest.raises(UserError, match="this host has no network interface nope"):
        RankStore.from_environment()
