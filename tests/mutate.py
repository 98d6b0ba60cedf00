"""Try the faults of `mutations.yaml` one at a time, and report which the default tests notice.

Usage: python tests/mutate.py [--list] [WORDS…]: all faults, or those whose names contain one of the words; --list only
checks that each fault still has its line. Each fault is put into a copy of the last commit, where its tests run until
the first failure. The exit code is the number of faults that the tests miss, or whose line is no longer unique.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "not slow and not gpu and not slurm and not docker and not te and not serving and not tracking"


def put_into(copy: Path, fault: dict[str, str]) -> bool:
    """Replace the line of a fault in a copy; return whether the copy has exactly one such line."""
    path = copy / fault["file"]
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    places = [number for number, line in enumerate(lines) if fault["old"] in line]
    if len(places) != 1:
        return False
    lines[places[0]] = lines[places[0]].replace(fault["old"], fault["new"])
    path.write_text("".join(lines))
    return True


def notice(copy: Path, fault: dict[str, str]) -> str:
    """Run the tests of a fault in a copy; return the first failing test, or an empty string."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", DEFAULT]
    command += fault["tests"].split()
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        return f"? pytest ended with code {result.returncode}: {result.stdout[-500:]}"
    return next((line for line in result.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))), "")


def main() -> int:
    faults = yaml.safe_load((ROOT / "tests" / "mutations.yaml").read_text())
    words = [word for word in sys.argv[1:] if word != "--list"]
    chosen = [fault for fault in faults if not words or any(word in fault["name"] for word in words)]
    missed = 0
    for fault in chosen:
        with tempfile.TemporaryDirectory() as folder:
            copy, start = Path(folder), time.monotonic()
            archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x"], cwd=copy, input=archive, check=True)
            if not put_into(copy, fault):
                result = "STALE, the line is not unique in the file"
            elif "--list" in sys.argv:
                result = "applies"
            else:
                result = notice(copy, fault) or "MISSED"
        missed += result.startswith(("STALE", "MISSED", "?"))
        print(f"{fault['name']} ({time.monotonic() - start:.0f} s): {result}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults {'have their line' if '--list' in sys.argv else 'noticed'}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
