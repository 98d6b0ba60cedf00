"""Limits the number of files that the test process may have open."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice


@contextmanager
def few_open_files(further: int = 12) -> Iterator[None]:
    """Allow this process, during the block, only `further` open files in addition to the open ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in count() if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, further, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
