import signal
from collections.abc import Callable
from types import FrameType

import pytest

from maskmoe.processes.signals import deferring_signals


def interrupt_and(finish: Callable[[], None]) -> None:
    with deferring_signals():
        signal.raise_signal(signal.SIGINT)
        finish()


def fail() -> None:
    raise ValueError


def test_a_signal_is_handled_after_the_block() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_and(lambda: steps.append("the block ran to its end"))
    assert steps
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_is_handled_if_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_and(fail)


def test_handlers_and_ignored_signals_stay() -> None:
    handled: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        handled.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferring_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            assert handled == []
        assert handled == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handle
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
