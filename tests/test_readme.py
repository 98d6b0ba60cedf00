"""The README's commands, run as they stand but for smaller numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What a reader runs, and what suffices to see that it runs.
SMALLER = {
    "--max-bytes 12000000": "--max-bytes 1500000",
    "--train-iters 200": "--train-iters 4",
    "--lr-warmup-iters 20": "--lr-warmup-iters 2",
    "--log-interval 10": "--log-interval 1",
    "--eval-interval 100 --eval-iters 5": "--eval-interval 4 --eval-iters 1",
    "--save-interval 100": "--save-interval 4",
    "--max-new-tokens 40": "--max-new-tokens 4",
}


@pytest.fixture
def pipeline_by_hand() -> str:
    """The commands of the README's section, from the first that makes something on."""
    section = re.split(r"^## ", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE)
    section = next(text for text in section if text.startswith("The pipeline by hand"))
    script = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1)
    set_up, pipeline = script.split("source .venv/bin/activate\n")
    assert set_up == "bash launch/setup.sh\n"
    for command, smaller in SMALLER.items():
        assert command in pipeline
        pipeline = pipeline.replace(command, smaller)
    return pipeline


def test_pipeline_by_hand(pipeline_by_hand, tmp_path):
    (tmp_path / "tools").symlink_to(REPOSITORY / "tools")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", pipeline_by_hand],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    made = {file.name for file in (tmp_path / "runs" / "by-hand").iterdir()}
    assert {"mask.safetensors", "checkpoints", "evaluation.json", "tensorboard"} <= made
    assert re.search(r"validation loss at iteration 4", result.stdout)
    assert "next 50 %" in result.stdout  # the table of the evaluation
    assert "def __init__(self" in result.stdout[-2000:]  # the generated text
