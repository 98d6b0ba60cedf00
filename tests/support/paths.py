"""Paths in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
BENCHMARKS = ROOT / "tools" / "benchmarks"
RANK_SCRIPTS = TESTS / "support" / "ranks"
