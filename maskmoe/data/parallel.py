"""Run independent tasks on worker processes and return their results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice

from maskmoe.errors import RunFailure, UserError
from maskmoe.processes.signals import SIGNALS_THAT_END_TOOLS, deferring_signals

_TASKS_PER_WORKER = 16


def available_cores() -> int:
    """Return the number of cores that this process may use: the share of a container or job, not of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes[Task, Result](
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int | None
) -> Iterator[Result]:
    """Yield `function(task)` for every task, in the order of the tasks, computed by worker processes.

    Only a bounded number of tasks is read ahead of the results, so memory does not grow with the number of tasks. With
    one worker or one task, the calling process does the work and starts no other. The first exception of a task is
    raised here, and tasks that have not started are dropped.

    Args:
        function: A function of a module, or a `functools.partial` of one; sent to the workers by pickle.
        tasks: Arguments of the calls, sent by pickle.
        workers: Number of processes, or None for one process on each available core.

    Raises:
        UserError: `workers` is less than 1.
        RunFailure: A worker process was killed.
    """
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"need at least 1 worker process, not {workers}")
    remaining = iter(tasks)
    first_two = list(islice(remaining, 2))
    tasks = chain(first_two, remaining)
    if workers == 1 or len(first_two) < 2:
        yield from map(function, tasks)
        return
    # Workers do not fork from the calling process, which may hold locks of a library's threads. They fork from a server
    # that has imported the function's module, which saves each worker the time of the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([(function.func if isinstance(function, partial) else function).__module__])
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            # A signal in the middle of starting a worker would leave a pool that cannot be shut down.
            with deferring_signals():
                pending.append(pool.submit(function, task))
            if len(pending) >= workers * _TASKS_PER_WORKER:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)
    except BrokenProcessPool as error:
        raise RunFailure("a worker process was killed, perhaps for lack of memory; give fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Let a new worker react to the end of the calling process only, which ends its workers after a signal."""
    for number in SIGNALS_THAT_END_TOOLS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    """End this worker when the calling process has ended, even if it was killed.

    The kernel cannot signal that end: the worker's parent is the server, which lives as long as its workers.
    """
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)
