"""Runs the command line tools as a user does."""

import subprocess
import sys
from pathlib import Path

from support.paths import ROOT


def run_tool(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python tools/NAME.py ARGUMENTS…` in the folder `cwd` and return its exit code and output."""
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def assert_bad_input(process: subprocess.CompletedProcess, *words: str) -> None:
    """Check that a tool rejected its input: exit code 2 and one line of error that holds all `words`."""
    assert process.returncode == 2, process.stderr
    (message,) = process.stderr.splitlines()
    assert message.startswith("error: ")
    for word in words:
        assert word in message
