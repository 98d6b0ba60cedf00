"""The page about the user's own script: the examples run as printed, and the table of patches is complete."""

import re
from pathlib import Path

import pytest
from support.documentation import DOCS, bash_blocks, blocks, run_script

from maskmoe.megatron_compat import checkpoint_patches, patches

PAGE = DOCS / "library.md"
MASK, PRETRAIN, LOOP, LAYER = (block.text for block in bash_blocks(PAGE))
SCRIPTS = [block.text for block in blocks(PAGE) if block.language == "python"]
NAMES = ("my_pretrain.py", "my_loop.py", "my_layer.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the scripts and the mask of the page."""
    for name, script in zip(NAMES, SCRIPTS, strict=True):
        (tmp_path / name).write_text(script, encoding="utf-8")
    assert run_script(MASK, tmp_path, timeout=60).returncode == 0
    return tmp_path


def train(command: str, folder: Path, loss: str) -> list[float]:
    """Run a command of the page; return the losses that it prints."""
    result = run_script(command, folder, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return [float(value) for value in re.findall(loss, result.stdout)]


@pytest.mark.slow
def test_pretrain_of_megatron_runs_as_printed(folder: Path) -> None:
    losses = train(PRETRAIN, folder, r"lm loss: (\S+)")
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_loop_runs_as_printed(folder: Path) -> None:
    losses = train(LOOP, folder, r"'loss': tensor\(([\d.]+)\)")
    assert len(losses) == 2 * 20  # of the two ranks of the last pipeline stage
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_layer_runs_as_printed(folder: Path) -> None:
    result = run_script(LAYER, folder, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("output (32, 4, 64), gradient True") == 2


def test_table_lists_all_patches_of_a_process() -> None:
    all_patches = (*patches.EVERY_PROCESS, *checkpoint_patches.EVERY_PROCESS)
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(patch.__name__ for patch in all_patches)
