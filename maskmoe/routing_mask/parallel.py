"""Independent pieces of work, done in order of submission on worker processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from maskmoe.errors import UserError


def available_cores() -> int:
    """Cores this process may run on (a container's or a job's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes[Task, Result](
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None
) -> Iterator[Result]:
    """Yield `function(task)` for every task, in order; the first failing task's exception is raised, the rest dropped.

    `workers` is the number of processes, all available cores when None. With one worker or one task nothing is started.
    Processes are spawned, not forked: the caller may hold threads.

    Raises:
        UserError: `workers` is less than 1.
    """
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"need at least 1 worker process, not {workers}")
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, tasks)
