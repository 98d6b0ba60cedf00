"""The tutorial's commands run as printed, with smaller numbers."""

import re
from pathlib import Path

import pytest
from support.documentation import DOCS, bash_blocks, run_script
from support.paths import ROOT

# Numbers on the page, and smaller numbers that show that the commands work.
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
def script() -> str:
    """The commands of the page after the set-up, as one script with smaller numbers."""
    set_up, *steps = bash_blocks(DOCS / "tutorial.md")
    assert set_up.text == "bash launch/setup.sh --extras hf\nsource .venv/bin/activate\n"
    # Other pages continue with the tutorial's files.
    converting, *_ = bash_blocks(DOCS / "converting.md")
    programs = (block for page in ("method.md", "dispatch.md") for block in bash_blocks(DOCS / page))
    programs = [block for block in programs if "tools/studies/" in block.text]
    text = "".join(step.text for step in (*steps, converting, *programs))
    text = text.replace(".venv/bin/python tools/", f"python {ROOT}/tools/")
    for number, smaller in SMALLER.items():
        assert number in text
        text = text.replace(number, smaller)
    return text


@pytest.mark.slow
def test_tutorial_runs_in_an_empty_folder(script: str, tmp_path: Path) -> None:
    result = run_script(script, tmp_path, timeout=800)

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    folder = tmp_path / "runs" / "by-hand"
    files = ["mask.safetensors", "checkpoints", "evaluation.json", "tensorboard", "model/config.json", "dispatch.csv"]
    files += ["model-bf16/config.json", "../../wider.safetensors"]
    assert [name for name in [*files, "routing/layers.csv"] if not (folder / name).exists()] == []
    assert re.search(r"validation loss at iteration 4", result.stdout)
    assert "next 50 %" in result.stdout  # the table of the evaluation
    # The checkpoint continues the prompt, and the exported model does so on both pages.
    assert len(re.findall(r"^def __init__\(self", result.stdout, re.MULTILINE)) == 3
