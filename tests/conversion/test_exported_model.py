"""Files of a model's folder that lead elsewhere, or that nobody can read to their end, are refused by `sample`."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file
from support.tiny_maskmoe import make_model, random_mask
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from maskmoe.conversion.exported_model import load_exported_model, load_exported_tokenizer
from maskmoe.conversion.model_tensors import routing_mask_tensors
from maskmoe.errors import UserError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model in several files with a tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    mask = random_mask()
    make_model(mask, routing_mask=routing_mask_tensors(mask)[1]).save_pretrained(folder, max_shard_size="20KB")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def load(folder):
    return load_exported_model(folder, load_exported_tokenizer(folder))


def test_intact_model_loads(exported):
    names = {name for file in exported.glob("*.safetensors") for name in load_file(file)}
    assert load(exported).state_dict().keys() >= names


@pytest.mark.parametrize("name", ["pipe", "../../dev/zero", "/dev/zero", "zeros", "outside.safetensors", "none"])
def test_index_that_leads_outside_the_folder(exported, tmp_path, name):
    folder = shutil.copytree(exported, tmp_path / "model")
    (tmp_path / "elsewhere.safetensors").write_bytes(next(exported.glob("*.safetensors")).read_bytes())
    os.mkfifo(folder / "pipe")
    (folder / "zeros").symlink_to("/dev/zero")
    (folder / "outside.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(folder)) as error:
        load_exported_model(folder, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "added_tokens.json"])
def test_pipe_among_the_files(exported, tmp_path, name):
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        load(folder)
