"""A rank that would wait for a dead process of asynchronous saving fails instead."""

import multiprocessing
import time
from collections.abc import Callable
from queue import Empty

import pytest

from maskmoe.checkpoint.writer_process import WriterQueue
from maskmoe.errors import RunFailure

CONTEXT = multiprocessing.get_context("fork")


def start(write: Callable[..., None], *args) -> multiprocessing.Process:
    writer = CONTEXT.Process(target=write, args=args, daemon=True)
    writer.start()
    return writer


@pytest.mark.parametrize(
    ("num_items", "call"), [(0, lambda queue: queue.put(1)), (0, WriterQueue.get_nowait), (1, WriterQueue.join)]
)
def test_dead_writer_is_reported(num_items, call):
    writer = start(time.sleep, 1000)
    queue = WriterQueue(CONTEXT.JoinableQueue(), writer)
    for item in range(num_items):
        queue.put(item)
    writer.kill()
    writer.join()
    with pytest.raises(
        RunFailure, match=r"process that writes .* has died \(.*, exit code -9\); .* Start the run again"
    ):
        call(queue)


def process_one(queue) -> None:
    queue.get()
    queue.task_done()


def test_writer_may_end_when_it_has_processed_all_items():
    stock = CONTEXT.JoinableQueue()
    writer = start(process_one, stock)
    queue = WriterQueue(stock, writer)
    with pytest.raises(Empty):
        queue.get_nowait()
    queue.put(1)
    queue.join()
    writer.join()
    queue.join()


def test_large_item_that_nobody_reads_does_not_keep_the_rank_alive():
    """A rank whose writer has died exits, although its queue holds more than a pipe does."""

    def put_and_exit() -> None:
        stock = CONTEXT.JoinableQueue()
        WriterQueue(stock, multiprocessing.current_process()).put(bytes(1 << 20))

    rank = start(put_and_exit)
    rank.join(20)
    assert rank.exitcode == 0
