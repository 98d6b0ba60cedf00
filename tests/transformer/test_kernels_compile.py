"""All kernels compile for Hopper and Blackwell, which needs no GPU."""

import os
import subprocess
import sys

import pytest
from support import compile_kernels
from support.paths import TESTS, python_path


@pytest.mark.parametrize("case", compile_kernels.CASES)
def test_kernels_compile(case: str) -> None:
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, compile_kernels.__file__, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()
