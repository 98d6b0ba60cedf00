"""The commands and scripts of whole pages run as printed, with smaller numbers."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.datasets import write_documents
from support.documentation import DOCS, bash_blocks, blocks, run_script
from support.paths import EXPORTED_MODEL, ROOT

from maskmoe.huggingface import export_code
from maskmoe.megatron_compat import checkpoint_patches, process_patches
from maskmoe.routing_mask.mask import RoutingMask


def run(script: str, folder: Path, timeout: int = 300) -> str:
    """Run a script in a folder; return its output."""
    result = run_script(script, folder, timeout=timeout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-4000:]
    return result.stdout


def python_blocks(page: str) -> list[str]:
    return [block.text for block in blocks(DOCS / page) if block.language == "python"]


def with_smaller_numbers(text: str, smaller: dict[str, str]) -> str:
    for number, small in smaller.items():
        assert number in text
        text = text.replace(number, small)
    return text


SMALLER_TUTORIAL = {
    "--max-bytes 12000000": "--max-bytes 1500000",
    "--train-iters 200": "--train-iters 4",
    "--lr-warmup-iters 20": "--lr-warmup-iters 2",
    "--log-interval 10": "--log-interval 1",
    "--eval-interval 100 --eval-iters 5": "--eval-interval 4 --eval-iters 1",
    "--save-interval 100": "--save-interval 4",
    "--max-new-tokens 40": "--max-new-tokens 4",
}


@pytest.mark.slow
def test_tutorial_runs_in_an_empty_folder(tmp_path: Path) -> None:
    """Other pages continue with the tutorial's files."""
    set_up, *steps = bash_blocks(DOCS / "tutorial.md")
    assert set_up.text == "bash launch/setup.sh --extras hf\nsource .venv/bin/activate\n"
    converting, *_ = bash_blocks(DOCS / "converting.md")
    programs = (block for page in ("method.md", "dispatch.md") for block in bash_blocks(DOCS / page))
    programs = [block for block in programs if "tools/studies/" in block.text]
    text = with_smaller_numbers("".join(step.text for step in (*steps, converting, *programs)), SMALLER_TUTORIAL)
    output = run(text.replace(".venv/bin/python tools/", f"python {ROOT}/tools/"), tmp_path, timeout=800)
    folder = tmp_path / "runs" / "by-hand"
    files = ["mask.safetensors", "checkpoints", "evaluation.json", "tensorboard", "model/config.json", "dispatch.csv"]
    files += ["model-bf16/config.json", "../../wider.safetensors", "routing/layers.csv"]
    assert [name for name in files if not (folder / name).exists()] == []
    assert re.search(r"validation loss at iteration 4", output)
    assert "next 50 %" in output  # the table of the evaluation
    # The checkpoint continues the prompt, and the exported model does so on both pages.
    assert len(re.findall(r"^def __init__\(self", output, re.MULTILINE)) == 3


@pytest.mark.slow
def test_a_run_is_extended(tmp_path: Path) -> None:
    commands = "\n".join(block.text for block in bash_blocks(DOCS / "extending.md"))
    run(commands.replace("launch/", f"{ROOT}/launch/"), tmp_path, timeout=600)
    for name, end in {"first": 40, "short": 30, "branch": 30, "tuned": 20}.items():
        tracker = tmp_path / "runs" / name / "checkpoints" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text().strip() == str(end), name


@pytest.mark.slow
def test_a_model_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script loads the model's code from the folder of the model, as on a machine without the package."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / "runs" / "by-hand" / "model"
    shutil.copytree(EXPORTED_MODEL, model)
    export_code(model)
    shutil.copy(EXPORTED_MODEL.parent / "tokenizer.model", tmp_path)  # the conversion needs the tokenizer of training
    (script,) = python_blocks("fine-tuning.md")
    script = with_smaller_numbers(script, {"max_steps=200": "max_steps=4", "logging_steps=50": "logging_steps=2"})
    (tmp_path / "fine_tune.py").write_text(script, encoding="utf-8")
    _, *commands = (block.text for block in bash_blocks(DOCS / "fine-tuning.md"))
    output = run("".join(commands), tmp_path)
    first, last = (float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", output))
    assert last < first
    assert "17 + 25 =" in output
    assert (tmp_path / "runs" / "by-hand" / "tuned-megatron" / "release").is_dir()


def test_a_table_of_hash_layers_is_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "docs").symlink_to(DOCS)
    rng = np.random.default_rng(0)
    write_documents(tmp_path / "data" / "text_document", [rng.zipf(1.2, 50_000) % 32000])
    page = DOCS / "hash-layers.md"
    output = run("\n".join(block.text for block in bash_blocks(page)), tmp_path)
    last_lines, *_ = (block.text for block in blocks(page) if block.language == "text")
    assert last_lines in output
    mask, again = (RoutingMask.load(tmp_path / name) for name in ("hash-mask.safetensors", "again.safetensors"))
    assert mask.num_layers == 6
    for layer in range(6):
        assert np.array_equal(mask.visible_sets(layer), again.visible_sets(layer))
    # The lines that load the table name its tensors.
    (lines,) = python_blocks("hash-layers.md")
    names = {lines.partition('tables[f"')[2].partition('"]')[0].replace("{module.layer_number - 1}", n) for n in "135"}
    assert names == load_file(tmp_path / "tid2eid.safetensors").keys()


# ---- The user's own script -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "losses"), [(0, r"lm loss: (\S+)"), (1, r"'loss': tensor\(([\d.]+)\)")], ids=["pretrain", "loop"]
)
def test_own_script_trains(tmp_path: Path, number: int, losses: str) -> None:
    found = [float(value) for value in re.findall(losses, run_own_script(tmp_path, number))]
    assert len(found) == (10, 2 * 20)[number]  # the loop prints those of the two ranks of the last pipeline stage
    assert found[-1] < found[0] - 0.5


@pytest.mark.slow
def test_own_script_uses_a_layer(tmp_path: Path) -> None:
    assert run_own_script(tmp_path, 2).count("output (32, 4, 64), gradient True") == 2


def run_own_script(folder: Path, number: int) -> str:
    """Run one of the scripts of the page with the mask of the page; return its output."""
    for name, script in zip(("my_pretrain.py", "my_loop.py", "my_layer.py"), python_blocks("library.md"), strict=True):
        (folder / name).write_text(script, encoding="utf-8")
    mask, *commands = (block.text for block in bash_blocks(DOCS / "library.md"))
    return run(mask + commands[number], folder)


def test_table_lists_all_patches_of_a_process() -> None:
    all_patches = (*process_patches.EVERY_PROCESS, *checkpoint_patches.EVERY_PROCESS)
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "library.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(patch.__name__ for patch in all_patches)
