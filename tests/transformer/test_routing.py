"""Routing compiled as on GPUs, but by inductor's C++ backend; routing and dispatch on a GPU without storage."""

import json
import os
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from support import compile_routing, fake_gpu
from support.paths import BENCHMARKS, TESTS, python_path

# Both sides compute in float32, and add in different orders.
TOLERANCE = 1e-6
# The compiled functions keep float32 where the eager ones round to bfloat16 after each operation.
BF16_TOLERANCE = 2**-6
FAST = ("usual", "rows")

has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's C++ backend needs g++")


def run_without_adapter(program: ModuleType, *arguments: str) -> list[dict[str, Any]]:
    """Run a program in a process without the CPU adapter, and return the objects that it prints."""
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS, BENCHMARKS)}
    command = [sys.executable, program.__file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_cases(*cases: str) -> dict[str, dict[str, Any]]:
    """Compile and run cases; return what the process found for each."""
    return dict(zip(cases, run_without_adapter(compile_routing, *cases), strict=True))


@has_compiler
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
@has_compiler
def test_every_option() -> None:
    found = compile_cases(*(name for name in compile_routing.CASES if name not in FAST))
    for name, case in found.items():
        assert case["difference"] <= (BF16_TOLERANCE if name == "bfloat16" else TOLERANCE), (name, case)
        assert case["graph_breaks"] == 0
        assert case["compilations"] == 1


def test_no_operation_mixes_devices() -> None:
    """All results are on the GPU; ids or a routing map on the CPU are noticed everywhere. Nothing reads a value."""
    works = [*(f"route: {name}" for name in compile_routing.CASES), "plan", "copy_rows"]
    on_gpu, mixed = run_without_adapter(fake_gpu, "cuda", "cpu")
    assert on_gpu == dict.fromkeys(works, "cuda")
    assert mixed == dict.fromkeys(works, "mixed")
