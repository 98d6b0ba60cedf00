"""The routing of tokens, compiled as on GPUs but by inductor's C++ backend, against the eager functions."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from support import compile_routing
from support.paths import TESTS, python_path

# Both sides compute in float32, and add in different orders.
TOLERANCE = 1e-6
# The compiled functions keep float32 where the eager ones round to bfloat16 after each operation.
BF16_TOLERANCE = 2**-6
FAST = ("usual", "rows")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's C++ backend needs g++")


def compile_cases(*cases: str) -> dict[str, dict[str, Any]]:
    """Run cases in a process without the CPU adapter, which leaves compilation out; return what the process found."""
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS)}
    command = [sys.executable, compile_routing.__file__, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def test_compiled_routing_equals_eager_routing() -> None:
    """The usual options in generated code; all options in traced code, for numbers of rows that fall to 0."""
    found = compile_cases(*FAST)
    assert all(case["difference"] <= TOLERANCE and case["graph_breaks"] == 0 for case in found.values()), found
    # Batches of other sizes need no compilation, except 0 rows and 1 row.
    assert (found["usual"]["compilations"], found["rows"]["compilations"]) == (1, 3)
    forward, backward = found["usual"]["kernels"]
    assert 0 < forward <= 16
    assert 0 < backward <= 6


@pytest.mark.slow
def test_every_option() -> None:
    found = compile_cases(*(name for name in compile_routing.CASES if name not in FAST))
    for name, case in found.items():
        assert case["difference"] <= (BF16_TOLERANCE if name == "bfloat16" else TOLERANCE), (name, case)
        assert case["graph_breaks"] == 0
        assert case["compilations"] == 1
