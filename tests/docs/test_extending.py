"""The commands of the page about extending a run work one after the other."""

from pathlib import Path

import pytest
from support.documentation import DOCS, bash_blocks, run_script
from support.paths import ROOT

PAGE = DOCS / "extending.md"


@pytest.mark.slow
def test_commands_work_one_after_the_other(tmp_path: Path):
    script = "\n".join(block.text for block in bash_blocks(PAGE)).replace("launch/", f"{ROOT}/launch/")
    result = run_script(script, tmp_path, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    ends = {"first": 40, "short": 30, "branch": 30, "tuned": 20}
    for run, end in ends.items():
        tracker = tmp_path / "runs" / run / "checkpoints" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text().strip() == str(end), run
