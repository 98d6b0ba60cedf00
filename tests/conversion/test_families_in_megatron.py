"""Other people's models, imported or upcycled, compute the same in Megatron, and training goes on from them."""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from support.foreign_models import CONFIGS, VOCAB_SIZE, logits_of, random_ids, save_model
from transformers import AutoModelForCausalLM

from maskmoe.conversion.convert import huggingface_to_megatron, upcycle_model
from maskmoe.conversion.settings import Settings, UpcycleSettings
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.mask import RoutingMask, build_routing_mask
from maskmoe.training.arguments import add_maskmoe_arguments
from maskmoe.training.model_builder import MaskMoEGPTModelBuilder
from maskmoe.training.resume import further_checkpoint_args
from maskmoe.training.setup import model_config_from_args

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"
# Attention and rotary embedding are computed in another way, in fp32; logits are about 5. Seen: 8e-6.
ROUNDING = 1e-4
TRAINING = "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3"
NUM_EXPERTS, LAYERS = 4, 3


def megatron_logits(load: Path, flags: list[str], ids: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of the model in a folder of checkpoints, made with such flags as users give.

    Args:
        flags: those that the conversion said loading needs.
    """
    words = f"pretrain --load {load} --use-checkpoint-args {' '.join(flags)} {TRAINING} --data-path none".split()

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = add_maskmoe_arguments(parser)
        parser.set_defaults(**further_checkpoint_args(load / "release"))
        return parser

    with mock.patch.object(sys, "argv", words):
        args, _ = load_args_from_checkpoint(parse_args(add_arguments))
        args = validate_args(args)
    model = MaskMoEGPTModelBuilder(model_config_from_args(args)).build_model(
        ProcessGroupCollection.use_mpu_process_groups()
    )
    state = {"model": model.sharded_state_dict()}
    model.load_state_dict(dist_checkpointing.load(state, str(load / "release"))["model"])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model.eval()(ids, positions, None)[..., :VOCAB_SIZE]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_originals(name, tmp_path, one_rank):
    original = save_model(name, tmp_path / "original")
    flags = huggingface_to_megatron(Settings(load=tmp_path / "original", save=tmp_path / "megatron"))
    ids = random_ids()
    expected = logits_of(original, ids)
    logits = megatron_logits(tmp_path / "megatron", flags, ids)
    torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=0)
    assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.fixture
def mask() -> RoutingMask:
    """Half of the ids see one expert, for the others there are two."""
    recipe = MaskRecipe.from_preset("top-k-hash", NUM_EXPERTS, LAYERS, frequent_visible_experts=2)
    mixed = build_routing_mask(recipe, vocab_size=VOCAB_SIZE)
    row_of_id = mixed.row_of_id.copy()
    row_of_id[:, ::2] %= NUM_EXPERTS
    return RoutingMask(row_of_id, mixed.visible_bits, VOCAB_SIZE, NUM_EXPERTS, LAYERS, mixed.provenance)


@pytest.mark.parametrize(
    "recipe",
    [
        UpcycleSettings(NUM_EXPERTS),
        UpcycleSettings(NUM_EXPERTS, topk=3, moe_layer_freq=[0, 1, 1], shared_expert=True),
    ],
    ids=["all layers", "some layers, shared expert"],
)
@pytest.mark.parametrize("dense_format", ["hf", "megatron"])
def test_upcycled_models_compute_what_the_dense_one_did(recipe, dense_format, mask, tmp_path, one_rank):
    dense = tmp_path / "hf"
    original = save_model("qwen3", dense)
    if dense_format == "megatron":
        dense = tmp_path / "megatron"
        huggingface_to_megatron(Settings(load=tmp_path / "hf", save=dense))
    flags = upcycle_model(Settings(load=dense, save=tmp_path / "upcycled"), recipe, mask, to_megatron=True)
    upcycle_model(Settings(load=dense, save=tmp_path / "upcycled_hf"), recipe, mask, to_megatron=False)
    ids = random_ids()
    expected = logits_of(original, ids)
    for logits in (
        megatron_logits(tmp_path / "upcycled", flags, ids),
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "upcycled_hf"), ids),
    ):
        torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=0)
        assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))


def execute(program: str, folder: Path) -> subprocess.CompletedProcess:
    """Run Python in a folder."""
    return subprocess.run(
        [sys.executable, *program.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(program: str, folder: Path) -> str:
    """What Python says that runs in a folder, and ends well."""
    process = execute(program, folder)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command", "ranks"),
    [
        ("olmoe", "hf-to-megatron", 1),
        ("olmoe", "hf-to-megatron", 2),
        ("qwen2_moe", "hf-to-megatron", 2),
        ("llama", "upcycle", 1),
    ],
)
def test_training_goes_on_from_them(name, command, ranks, mask, tmp_path):
    """With the flags that the conversion names, and no others for the model."""
    save_model(name, tmp_path / "original")
    mask.save(tmp_path / "mask.safetensors")
    options = f"--routing-mask mask.safetensors --num-experts {NUM_EXPERTS}" if command == "upcycle" else ""
    said = run(f"{TOOL} {command} --load original --save imported {options}", tmp_path)
    assert ("it computes what the dense model did" in said) == (command == "upcycle")
    named = said.partition("load it with")[2]
    layout = "--tensor-model-parallel-size 2 --sequence-parallel" if ranks == 2 else ""
    data = f"--mock-data --split 100,0,0 --eval-iters 0 --log-interval 1 --save run --save-interval 2 {layout}"
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m maskmoe.training.pretrain"
    said = run(f"{launcher} {named} --tokenizer-type NullTokenizer {TRAINING} {data}", tmp_path)
    assert "successfully loaded checkpoint" in said
    assert said.count("lm loss:") == 2
    assert (tmp_path / "run" / "iter_0000002").is_dir()


def test_refusal_is_one_line_and_leaves_nothing(tmp_path):
    save_model("mixtral", tmp_path / "original")
    config = tmp_path / "original" / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": null', '"sliding_window": 8'))
    process = execute(f"{TOOL} hf-to-megatron --load original --save imported", tmp_path)
    assert process.returncode == 2
    assert [line for line in process.stderr.splitlines() if "sliding_window 8" in line and line.startswith("error: ")]
    assert not (tmp_path / "imported").exists()
