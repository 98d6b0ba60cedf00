"""Reports of `inspect` on checkpoints and models."""

import json
import shutil

import pytest
from support.foreign_models import add_multi_token_prediction, save_model
from transformers import AutoModelForCausalLM

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.inspection import inspect_checkpoint
from maskmoe.conversion.settings import Settings
from maskmoe.errors import UserError


@pytest.fixture(scope="module")
def model(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected") / "model"
    megatron_to_huggingface(Settings(load=checkpoints("ranks"), save=folder))
    return folder


def test_checkpoint(checkpoints, workplace):
    found = inspect_checkpoint(checkpoints("ranks"))
    assert found.path == str(checkpoint_path(checkpoints("ranks"), 2))
    assert found.format == "torch_dist"
    assert found.iteration == 2
    assert found.integrity == "sound: all files have the content that was saved"
    assert found.layout == {"ranks": 4, "TP": 2, "PP": 2, "EP": 2, "CP": 1, "DP": 1}
    assert found.parameters["experts"] == 2 * 4 * 3 * 24 * 32
    assert found.parameters["shared experts"] == 2 * 3 * 16 * 32
    assert found.parameters["routers"] == 2 * 4 * 32
    assert found.parameters["attention"] == 2 * (32 + 2 * 16 + 32) * 32
    assert found.parameters["norms"] == (2 * 2 + 1) * 32
    assert found.active_parameters == sum(found.parameters.values()) - found.parameters["experts"] // 2
    assert found.bytes_by_dtype == {"float32": 4 * sum(found.parameters.values())}
    assert found.optimizer_bytes >= 8 * sum(found.parameters.values())
    mask = read_routing_mask(workplace.folder / "mask.safetensors")
    assert found.routing_mask["digest"] == mask.digest
    assert found.routing_mask["provenance"]["seed"] == 1


def test_model_has_the_checkpoints_parameters_without_padding(checkpoints, model):
    checkpoint, found = inspect_checkpoint(checkpoints("ranks")), inspect_checkpoint(model)
    assert found.format == "transformers (maskmoe)"
    assert found.iteration is None
    assert found.optimizer_bytes == 0
    assert found.routing_mask == checkpoint.routing_mask
    vocabulary = ("embedding", "output layer")
    for part, count in checkpoint.parameters.items():
        assert found.parameters[part] == (500 * 32 if part in vocabulary else count)
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    assert sum(found.parameters.values()) == loaded.num_parameters()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "llama"])
def test_models_of_other_families(name, tmp_path):
    original = save_model(name, tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.format == f"transformers ({name})"
    biases = sum(buffer.numel() for key, buffer in original.named_buffers() if key.endswith("score_correction_bias"))
    assert sum(found.parameters.values()) == original.num_parameters() + biases  # biases are buffers in transformers
    num_idle = 0 if name == "llama" else 6 - original.config.num_experts_per_tok
    of_expert = found.parameters.get("experts", 0) // 6
    assert found.active_parameters == sum(found.parameters.values()) - num_idle * of_expert
    assert "other" not in found.parameters
    assert ("experts" in found.parameters) == (name != "llama")
    assert found.integrity == "complete; not verified, since it was saved without digests"
    assert found.routing_mask is None


def test_a_converted_checkpoint_has_the_models_parameters(tmp_path):
    """The checkpoint holds each norm before experts under two names."""
    original = save_model("mixtral", tmp_path / "model")
    huggingface_to_megatron(Settings(load=tmp_path / "model", save=tmp_path / "megatron"))
    found, checkpoint = inspect_checkpoint(tmp_path / "model"), inspect_checkpoint(tmp_path / "megatron")
    padding = (128 - original.config.vocab_size) * original.config.hidden_size
    assert sum(checkpoint.parameters.values()) == original.num_parameters() + 2 * padding
    assert checkpoint.active_parameters == found.active_parameters + 2 * padding
    assert checkpoint.parameters["norms"] == found.parameters["norms"]
    assert checkpoint.bytes_by_dtype == {"float32": 4 * sum(checkpoint.parameters.values())}


def test_multi_token_prediction_is_a_part_of_its_own(tmp_path):
    original = save_model("deepseek_v3", tmp_path / "original")
    layer = add_multi_token_prediction(tmp_path / "original")
    huggingface_to_megatron(Settings(load=tmp_path / "original", save=tmp_path / "megatron"))
    megatron_to_huggingface(Settings(load=tmp_path / "megatron", save=tmp_path / "model", max_shard_size=20_000))
    checkpoint, model = (inspect_checkpoint(tmp_path / name) for name in ("megatron", "model"))
    num_parameters = sum(tensor.numel() for tensor in layer.values())
    assert model.parameters.pop("multi-token prediction") == num_parameters
    assert checkpoint.parameters["multi-token prediction"] == num_parameters
    biases = 2 * 6  # parameters in Megatron, buffers in transformers
    assert sum(model.parameters.values()) == original.num_parameters() + biases
    assert model.active_parameters == sum(model.parameters.values()) - model.parameters["experts"] * 2 // 6
    assert any((tmp_path / "model" / "megatron").glob("mtp-00001-of-*.safetensors"))
    shutil.rmtree(tmp_path / "model" / "megatron")  # as in a folder that transformers saves again
    with pytest.raises(UserError, match=r"megatron/mtp\.safetensors is missing$"):
        huggingface_to_megatron(Settings(load=tmp_path / "model", save=tmp_path / "back"))


def test_damage_is_reported(checkpoints, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = inspect_checkpoint(tmp_path / "model")
    assert found.integrity == "model.safetensors does not have the content that was saved"
    assert inspect_checkpoint(tmp_path / "model", verify=False).integrity == "complete; not compared with its digests"
    with pytest.raises(UserError, match="nowhere does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")


def test_command_line(checkpoints, run_cli, tmp_path):
    result = run_cli("inspect", checkpoints("ranks"), "--json", tmp_path / "inspection.json")
    assert result.returncode == 0, result.stderr
    assert "saved by       ranks 4 · TP 2 · PP 2 · EP 2" in result.stdout
    written = json.loads((tmp_path / "inspection.json").read_text())
    assert written["routing_mask"]["digest"] in result.stdout
