"""The page about fine-tuning: its script and its commands run as printed, with fewer steps."""

import re
import shutil
from pathlib import Path

import pytest
from support.documentation import DOCS, bash_blocks, blocks, run_script
from support.paths import EXPORTED_MODEL

from maskmoe.huggingface import export_code

PAGE = DOCS / "fine-tuning.md"


@pytest.mark.slow
def test_all_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script loads the model's code from the folder of the model, as on a machine without the package."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / "runs" / "by-hand" / "model"
    shutil.copytree(EXPORTED_MODEL, model)
    export_code(model)
    (script,) = (block.text for block in blocks(PAGE) if block.language == "python")
    for number, smaller in {"max_steps=200": "max_steps=4", "logging_steps=50": "logging_steps=2"}.items():
        assert number in script
        script = script.replace(number, smaller)
    (tmp_path / "fine_tune.py").write_text(script, encoding="utf-8")
    _, *commands = (block.text for block in bash_blocks(PAGE))
    result = run_script("".join(commands), tmp_path, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    first, last = (float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", result.stdout))
    assert last < first
    assert "17 + 25 =" in result.stdout
    assert (tmp_path / "runs" / "by-hand" / "tuned-megatron" / "release").is_dir()
