"""The seal of exported models: any change of any file is found, by our commands and by transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.command_lines import run_command
from support.paths import EXPORTED_MODEL
from support.tiny_maskmoe import make_model, random_mask
from transformers import AutoModelForCausalLM

from maskmoe.checkpoint.integrity import MANIFEST_FILE
from maskmoe.checkpoint.reading import CheckpointError
from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.seal import check_seal
from maskmoe.conversion.settings import Settings
from maskmoe.huggingface import MaskMoEForCausalLM


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that an earlier version exported, exported again."""
    folder = tmp_path_factory.mktemp("seal")
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(EXPORTED_MODEL)}
    huggingface_to_megatron(Settings(load=EXPORTED_MODEL, save=folder / "megatron", **tokenizer))
    megatron_to_huggingface(Settings(load=folder / "megatron", save=folder / "model"))
    return folder / "model"


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy of the model."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def test_a_flipped_bit_in_any_file_is_found(model: Path) -> None:
    paths = [path for path in model.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    assert {"config.json", "model.safetensors", "tokenizer.json", "args.json"} <= {path.name for path in paths}
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-len(content) // 3] ^= 1
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=path.name):
            check_seal(model)
        path.write_bytes(whole)
    check_seal(model)


def test_all_readers_refuse_an_edited_configuration(model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 3}))  # which fits the weights
    run_command("generate", "--load", model, "--prompt", "import").assert_refused("config.json")
    analyze = ("analyze", "--load", model, "--data-path", "data", "--output-dir", tmp_path / "out")
    run_command(*analyze).assert_refused("config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        huggingface_to_megatron(Settings(load=model, save=tmp_path / "back"))
    with pytest.raises(ValueError, match=r"config\.json in .* is not the file that was exported"):
        AutoModelForCausalLM.from_pretrained(model)


def test_a_damaged_seal_is_refused_and_a_removed_one_is_not(model: Path) -> None:
    (model / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        check_seal(model)
    (model / MANIFEST_FILE).unlink()
    check_seal(model)


def test_seals_of_weights_alone_are_still_read(tmp_path: Path) -> None:
    shutil.copytree(EXPORTED_MODEL, tmp_path / "model")
    check_seal(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        check_seal(tmp_path / "model")


def test_a_model_saved_by_transformers_has_no_seal(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.norm.weight.fill_(7.0)
    loaded.save_pretrained(model)
    assert not (model / MANIFEST_FILE).exists()
    assert (AutoModelForCausalLM.from_pretrained(model).model.norm.weight == 7.0).all()


def test_the_mask_of_another_model_is_refused() -> None:
    model, other = make_model(random_mask(seed=1)), make_model(random_mask(seed=2))
    with pytest.raises(ValueError, match="does not match its digest"):
        model.load_state_dict(other.state_dict())
    again = MaskMoEForCausalLM(model.config)
    again.load_state_dict(make_model(random_mask(seed=1)).state_dict())
