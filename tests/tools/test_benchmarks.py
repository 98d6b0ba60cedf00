"""Benchmarks: pairs of ours and the baseline alternate."""

import harness
import pytest


def test_pairs_alternate_and_the_first_pair_warms_up(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def measure(side: str, seconds: float) -> float:
        calls.append(side)
        return seconds

    case = harness.Case("a", "s", lambda: measure("ours", 1.0), lambda: measure("baseline", 2.0))
    harness.report(harness.run([case], repeats=2), None)
    assert calls == ["ours", "baseline", "ours", "baseline", "baseline", "ours"]
    assert capsys.readouterr().out.splitlines()[-1] == "a ratio=0.500 (ours 1 s baseline 2 s)"
