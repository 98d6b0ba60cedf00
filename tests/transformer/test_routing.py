"""Routing compiled as on GPUs, but for a CPU."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from support import compiled_routing
from support.paths import BENCHMARKS, TESTS, python_path

# Both sides compute in float32, and add in different orders.
TOLERANCE = 1e-6
# The compiled functions keep float32 where the eager ones round to bfloat16 after each operation.
BF16_TOLERANCE = 2**-6


def run_without_adapter(backend: str, *names: str) -> dict[str, dict[str, Any]]:
    """Return what `compiled_routing.py` finds for each name, in a process without the CPU adapter."""
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS, BENCHMARKS)}
    command = [sys.executable, compiled_routing.__file__, backend, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


def test_traced_routing_equals_eager_routing() -> None:
    """Other sizes need no other graph."""
    for found in run_without_adapter("aot_eager", "usual", "everything").values():
        assert found["difference"] <= TOLERANCE
        assert found["graph_breaks"] == 0
        assert found["compilations"] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's C++ backend needs g++")
def test_every_option_in_generated_code() -> None:
    found = run_without_adapter("inductor", *compiled_routing.CASES)
    for name, case in found.items():
        assert case["difference"] <= (BF16_TOLERANCE if name == "bfloat16" else TOLERANCE), (name, case)
        assert case["graph_breaks"] == 0
        assert case["compilations"] == 1


@pytest.mark.parametrize(
    "names", [("usual", "sigmoid"), pytest.param(("laptop", "evaluation"), marks=pytest.mark.slow)], ids=str
)
def test_kernels_on_a_gpu(names: tuple[str, ...]) -> None:
    """Inductor's CUDA code: the look-up, the choice with the weights, and the sums over tokens."""
    for name, found in run_without_adapter("cuda", *names).items():
        forward, *backward = found["kernels"]
        assert 0 < forward <= 6, name
        assert backward == ([] if name == "evaluation" else [1]), name


@pytest.mark.slow
def test_kernels_can_be_assembled() -> None:
    run_without_adapter("ptxas", *compiled_routing.CASES)
