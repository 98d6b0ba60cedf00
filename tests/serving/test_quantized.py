"""The recipe of the documentation stores int8 weights, keeps the mask, and hardly changes the logits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.documentation import DOCS, blocks
from support.paths import ROOT, python_path
from support.tiny_maskmoe import make_served_model, random_ids, random_prompts, save_model
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]

TORCHAO = ROOT / "build" / "serving" / "torchao"
# Writes the logits of a quantized model for the ids of a file.
LOGITS = """
import sys, torch
import maskmoe.huggingface
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
named = [item for item in model.named_parameters() if "_proj" in item[0] and not item[0].endswith("norm.weight")]
types = {type(weight).__name__ for _, weight in named}
assert types == {"Int8Tensor"}, types
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["ids"]).logits}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs Python with torchao."""
    environment = os.environ | {"PYTHONPATH": python_path(ROOT, TORCHAO), "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="module", params=["gated_shared_experts", "latent_keys_and_values"])
def models(request, run, tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a model and of its quantized copy."""
    folder = tmp_path_factory.mktemp("quantized")
    original, quantized = save_model(make_served_model(request.param), folder / "original"), folder / "int8"
    (recipe,) = (block.text for block in blocks(DOCS / "converting.md") if block.language == "python")
    for documented, path in (("runs/by-hand/model", original), ("runs/by-hand/int8", quantized)):
        assert documented in recipe
        recipe = recipe.replace(documented, str(path))
    process = run("-c", recipe)
    assert process.returncode == 0, process.stderr[-3000:]
    return original, quantized


def test_only_projections_and_experts_are_quantized(models) -> None:
    original, quantized = (load_file(folder / "model.safetensors") for folder in models)
    unchanged = [name for name in original if "_proj" not in name or name.endswith("norm.weight")]
    assert any("routing_mask" in name for name in unchanged)
    for name in unchanged:
        assert torch.equal(quantized[name], original[name]), name
    data = [name for name in quantized if name.endswith("_qdata")]
    assert len(data) == len(original) - len(unchanged)


def test_logits_are_close(models, run, tmp_path) -> None:
    original, quantized = models
    # The quantized model loads in a new process, and its logits are close.
    ids = random_ids(2, 12)
    save_file({"ids": ids}, tmp_path / "ids")
    process = run("-c", LOGITS, quantized, tmp_path / "ids", tmp_path / "logits")
    assert process.returncode == 0, process.stderr[-3000:]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(original)(ids).logits
    difference = (load_file(tmp_path / "logits")["logits"] - expected).abs()
    # Rounding to int8 changes a row of normal weights by 0.8 %; some 15 to 20 matrices one after another, with large
    # random weights, bring the logits to 3 to 7 %. Logits of unrelated models differ by 140 %.
    assert 0 < difference.mean() < 0.1 * expected.abs().mean()


def test_vllm_refuses_a_quantized_model(models, answer_with_vllm) -> None:
    found = answer_with_vllm({"int8": models[1]}, random_prompts(2, longest=8), 4)["int8"]
    assert isinstance(found, str)
