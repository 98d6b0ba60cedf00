"""Exported models load through transformers' Auto classes, with this package and without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_maskmoe import make_model, random_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from maskmoe.huggingface import AUTO_MAP, MaskMoEConfig, MaskMoEForCausalLM, MaskMoEModel, export_code

# The beginning of a script that cannot import this package and Megatron.
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("maskmoe", "megatron"):
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocked())
"""


def run(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script in a new process that cannot import this package and Megatron, and has its caches in `folder`."""
    command = [sys.executable, "-I", "-c", BLOCK + script, *arguments]
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def exported(tmp_path) -> Path:
    """The folder of an exported model: weights, a configuration with `auto_map`, and the code."""
    folder = tmp_path / "model.v1"  # a module's name cannot have a dot, the name of a folder can
    make_model().save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    export_code(folder)
    return folder


def test_registered_with_the_auto_classes(exported) -> None:
    assert type(AutoConfig.from_pretrained(exported)) is MaskMoEConfig
    assert type(AutoModel.from_pretrained(exported)) is MaskMoEModel
    for trust_remote_code in (None, True):
        model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=trust_remote_code)
        assert type(model) is MaskMoEForCausalLM


def test_loads_and_generates_without_the_package(exported, tmp_path) -> None:
    script = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

_, folder, home = sys.argv
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "maskmoe"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "MaskMoEModel"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
for implementation in ("eager", "batched_mm", "grouped_mm"):
    model.set_experts_implementation(implementation)
token_ids = load_file(f"{home}/token_ids.safetensors")["token_ids"]
logits = model(token_ids).logits.detach()
generated = model.generate(token_ids[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
save_file({"logits": logits, "generated": generated}, f"{home}/results.safetensors")
model.save_pretrained(f"{home}/again")
again = AutoModelForCausalLM.from_pretrained(f"{home}/again", trust_remote_code=True)
assert torch.equal(again(token_ids).logits, logits)
"""
    token_ids = random_ids(2, 10)
    save_file({"token_ids": token_ids}, tmp_path / "token_ids.safetensors")
    result = run(script, tmp_path, str(exported), str(tmp_path))
    assert result.returncode == 0, result.stderr
    results = load_file(tmp_path / "results.safetensors")
    model = make_model()
    torch.testing.assert_close(results["logits"], model(token_ids).logits, rtol=1e-5, atol=1e-5)
    expected = model.generate(token_ids[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(results["generated"], expected)
    for name in ("configuration_maskmoe.py", "modeling_maskmoe.py"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
