"""Damaged and altered models end to end; tests of each reader have more damages."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.command_lines import refuse_all

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GENERATE = ("generate", "--prompt", "import", "--max-new-tokens", "3", "--load")
IMPORT = ("convert", "hf-to-megatron", "--save", "OUT", "--load")
TOKENIZE = ("preprocess", "--input", "text.txt", "--output-prefix", "OUT", "--workers=1")
TOKENIZE += ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")


def alter_mask(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.routing_mask.row_of_id"][0, 0] ^= 1
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **values}))


# One damage for each way in which a model fails, and a command that reads what is damaged.
DAMAGES = {
    "weights cut": (GENERATE, lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:10_000])),
    "config cut": (GENERATE, lambda folder: (folder / CONFIG).write_text("{")),
    "altered mask": (GENERATE, alter_mask),
    "altered mask of an import": (IMPORT, alter_mask),
    "a width that is a text": (IMPORT, lambda folder: set_config(folder, hidden_size="wide")),
    "adapters": (GENERATE, lambda folder: (folder / "adapter_config.json").write_text("{}")),
    "no tokenizer": (TOKENIZE, lambda folder: (folder / "tokenizer.json").unlink()),
    "a tokenizer that is a list": (TOKENIZE, lambda folder: (folder / "tokenizer.json").write_text("[]")),
}


@pytest.fixture
def damaged(workshop: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], str]:
    """Return a function that makes a damaged copy of the model."""

    def make(damage: Callable[[Path], object]) -> str:
        folder = tmp_path / "model"
        shutil.copytree(workshop / "model", folder)
        damage(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model_is_refused(damaged, workshop, name):
    command, damage = DAMAGES[name]
    refuse_all(workshop, [([*command, damaged(damage)], [])], after_progress=True)


def test_code_of_a_models_folder_is_not_run(damaged, workshop, tmp_path, monkeypatch):
    """The code is not run either if the user agrees to everything."""

    def add_code(folder: Path) -> None:
        set_config(folder, model_type="unknown", auto_map={"AutoConfig": "evil.Evil"})
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")

    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    refuse_all(workshop, [([*GENERATE, damaged(add_code)], [])])
    assert not (tmp_path / "ran").exists()
