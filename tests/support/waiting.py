"""Waiting for a condition, with a limit."""

import time
from collections.abc import Callable

import pytest


def wait_until(
    condition: Callable[[], object],
    what: str = "the condition",
    *,
    timeout: float = 120,
    period: float = 0.05,
    has_ended: Callable[[], bool] = lambda: False,
    report: Callable[[], str] = lambda: "",
) -> None:
    """Return as soon as `condition()` is true; fail the test if that takes too long.

    Args:
        condition: Called every `period` seconds.
        what: Names the condition in the failure's message.
        timeout: Seconds after which the test fails.
        period: Seconds between two calls of `condition`.
        has_ended: Whether the condition can no longer become true, for example because the process under test ended.
        report: Returns the text that the failure's message ends with.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        # The order matters: the condition may have become true just before the end.
        if has_ended() and not condition():
            pytest.fail(f"the process ended before {what}\n{report()}")
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s in vain for {what}\n{report()}")
        time.sleep(period)
