"""The budget of operations that an MoE layer launches on a GPU, and of waits of its host, counted without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

# Operations of the forward and of the backward pass. More cost time on a GPU; fewer are welcome.
BUDGET = {"planned": (31, 35), "one copy": (40, 28), "router": (16, 14), "plan": (22, 0)}
# The experts of the counted layers do not read the number of their rows.
WAITS = {"planned": 0, "one copy": 1, "router": 0, "plan": 1, "stock": 1}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Return the counts of `operations.py`, which needs a process of its own for its stand-in of 8 ranks."""
    path: Path = tmp_path_factory.mktemp("operations") / "counts.json"
    subprocess.run([sys.executable, ROOT / "tools/benchmarks/operations.py", "--json", path], check=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize("part", BUDGET)
def test_operations_stay_in_the_budget(part: str, counts: dict[str, dict[str, int]]) -> None:
    forward, backward = BUDGET[part]
    assert 0 < counts[part]["forward"] <= forward
    assert counts[part]["backward"] <= backward


@pytest.mark.parametrize("part", WAITS)
def test_host_waits(part: str, counts: dict[str, dict[str, int]]) -> None:
    assert counts[part]["forward_waits"] == WAITS[part]
    assert counts[part]["backward_waits"] == 0
