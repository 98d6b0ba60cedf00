"""Runs the command line tools in processes of their own."""

import subprocess
import sys
from pathlib import Path

from support.paths import ROOT


def run_tool(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python tools/NAME.py ARGUMENTS…` in the folder `cwd` and return its exit code and output."""
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
