"""Ranks exchange messages before they have process groups."""

import os
import threading
from argparse import Namespace

from support.launchers import run_as_ranks
from torch.distributed import HashStore

from maskmoe.training import ranks as ranks_module
from maskmoe.training.ranks import Ranks, meet_ranks

ARGS = Namespace(distributed_timeout_minutes=1)


def exchange() -> tuple[list[str], str, list[str]]:
    """Exchange messages, also after torchrun has restarted all ranks beside a store that has the old messages."""
    ranks = meet_ranks(ARGS)
    names = ranks.gather("name", f"rank {os.environ['RANK']}")
    word = ranks.broadcast("word", f"of {ranks.rank}")
    ranks_module._meet.cache_clear()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return names, word, meet_ranks(ARGS).gather("name", f"restarted rank {ranks.rank}")


def test_messages(tmp_path):
    results = run_as_ranks(exchange, tmp_path, joins=False)
    assert results == [(["rank 0", "rank 1"], "of 0", ["restarted rank 0", "restarted rank 1"])] * 2


def test_the_rank_that_holds_the_store_leaves_last():
    store = HashStore()
    first = threading.Thread(target=Ranks(store, 0, 2).gather, args=("settings", "a"))
    first.start()
    store.set("settings/1", "b")  # the second rank has sent its message, but has not read the others
    first.join(0.5)
    assert first.is_alive()
    assert Ranks(store, 1, 2).gather("settings", "b") == ["a", "b"]
    first.join(10)
    assert not first.is_alive()


def test_single_rank_needs_no_launcher(monkeypatch):
    ranks_module._meet.cache_clear()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = meet_ranks(ARGS)
    assert alone.gather("names", "me") == ["me"]
    assert alone.broadcast("word", "mine") == "mine"
