"""Paths in the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
EXPORTED_MODEL = TESTS / "compatibility" / "artefacts" / "model"
BENCHMARKS = ROOT / "tools" / "benchmarks"


def python_path(*folders: Path) -> str:
    """Return a value of `PYTHONPATH`: some folders, then the value of this process, which may name another Megatron."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
