"""Benchmarks: pairs that alternate, results as the last lines and as JSON, and bad input."""

import json
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
import ranks
import routed_tokens
from support.system import run_tool

from maskmoe.errors import UserError


def test_results_are_the_last_lines_and_pairs_alternate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def make_case(name: str, ours: float, baseline: float) -> harness.Case:
        def measure(side: str, value: float) -> float:
            calls.append(f"{name} {side}")
            return value

        return harness.Case(name, "s", lambda: measure("ours", ours), lambda: measure("baseline", baseline))

    cases = (make_case(*sizes) for sizes in (("a", 1.0, 2.0), ("b", 3.0, 2.0)))
    harness.report(harness.run(cases, repeats=2), tmp_path / "results.json")
    processor, *lines = capsys.readouterr().out.splitlines()
    assert processor == f"processor: {harness.processor()}"
    assert lines == [
        "a ratio=0.500 (ours 1 s baseline 2 s)",
        "b ratio=1.500 (ours 3 s baseline 2 s)",
    ]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(result["case"], result["ratio"], result["ours"]) for result in results] == [
        ("a", 0.5, [1.0, 1.0]),
        ("b", 1.5, [3.0, 3.0]),
    ]
    # The first pair warms up.
    sides = ["ours", "baseline", "ours", "baseline", "baseline", "ours"]
    assert calls == [f"{name} {side}" for name in "ab" for side in sides]


def test_costs_are_no_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    costs = iter([SimpleNamespace(cost=SimpleNamespace(operations=operations)) for operations in ("add", "multiply")])
    monkeypatch.setattr(ranks.SideCost, "of", lambda work: next(costs))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    ranks.compare("a", lambda: None, "stock", lambda: None)
    output = capsys.readouterr()
    assert (output.out, output.err.count("a: ")) == ("", 2)


def test_sizes_of_a_case() -> None:
    parser = harness.make_parser(None)
    routed_tokens.add_arguments(parser)
    assert parser.parse_args(["--experts", "1/4", "2/16"]).experts == ["1/4", "2/16"]
    for word in ("3", "2/", "2x4", "0/4", "1/4/4"):
        with pytest.raises(UserError, match=f"--experts must be K/N with whole numbers, not '{word}'"):
            parser.parse_args(["--experts", word])


@pytest.mark.parametrize(
    ("benchmark", "words", "problem"),
    [
        ("count_frequency", ("--repeats", "0"), "--repeats must be at least 1, not 0"),
        ("preprocess", ("--json", "nowhere/x.json"), "cannot write nowhere/x.json"),
    ],
)
def test_bad_input_is_one_line(benchmark: str, words: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    completed = run_tool(f"benchmarks/{benchmark}", *words, cwd=tmp_path)
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1)
    assert problem in completed.stderr
