"""The reports in docs/upstream are short, and their reproductions find the defects in the installed Megatron-Core."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

REPORTS = ROOT / "docs" / "upstream"
NAMES = sorted(path.stem for path in REPORTS.glob("*.md"))
# Imports Megatron once, without MaskMoE's adapter, and runs each reproduction in a fork.
RUN_ALL = """
import json, os, runpy, sys
import megatron.training.training
codes = {}
for script in sys.argv[1:]:
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(70)
    codes[script] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def exit_codes() -> dict[str, int]:
    """Run all reproductions; return their exit codes by name."""
    scripts = [str(REPORTS / f"{name}.py") for name in NAMES]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_ALL, *scripts],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return dict(zip(NAMES, json.loads(process.stdout.splitlines()[-1]).values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_defect_is_in_the_installed_version(name: str, exit_codes: dict[str, int]) -> None:
    """Exit code 1: the defect is mended, so its row of `KNOWN_BUGS` can go."""
    assert exit_codes[name] == 0


def test_reports_are_short_and_have_reproductions() -> None:
    assert {path.stem for path in REPORTS.glob("*.py")} == {*NAMES}
    assert all(len((REPORTS / f"{name}.md").read_text().splitlines()) <= 20 for name in NAMES)
    assert "maskmoe" not in "".join(path.read_text() for path in REPORTS.glob("*.py"))
