"""Models of other families, imported or upcycled, compute the same in Megatron, and training starts from them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.converted_models import (
    CONFIGS,
    TRAINING,
    VOCAB_SIZE,
    add_multi_token_prediction,
    load_converted_model,
    logits_of,
    logits_of_megatron,
    random_ids,
    save_model,
    to_megatron,
)
from support.launchers import run_program
from support.system import run_maskmoe
from transformers import AutoModelForCausalLM

from maskmoe.conversion.convert import upcycle_model
from maskmoe.conversion.settings import Settings, UpcycleSettings
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import RoutingMask

# Megatron computes attention and rotary embedding in another way, in fp32. The largest difference seen is 8e-6, for
# logits of about 5 in magnitude.
ROUNDING = 1e-4
NUM_EXPERTS, LAYERS = 4, 3


def megatron_logits(load: Path, flags: list[str], ids: torch.Tensor) -> torch.Tensor:
    """Load a converted model into Megatron; return its logits, float32 [batch, length, vocabulary]."""
    return logits_of_megatron(load_converted_model(load, flags)[0], ids)[..., :VOCAB_SIZE]


SELDOM = ("deepseek_v3, dense",)
"""Models whose settings other models have, too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in CONFIGS]
)
def test_logits_equal_the_originals(name, tmp_path, one_rank):
    original = save_model(name, tmp_path / "original")
    if name == "deepseek_v3":
        add_multi_token_prediction(tmp_path / "original")
    flags = to_megatron(tmp_path / "original", tmp_path / "megatron")
    ids = random_ids()
    expected = logits_of(original, ids)
    logits = megatron_logits(tmp_path / "megatron", flags, ids)
    torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=0)
    assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.fixture
def mask() -> RoutingMask:
    """A mask under which half of the ids see one expert and half see two experts."""
    recipe = MaskRecipe.from_preset("top-k-hash", NUM_EXPERTS, LAYERS, frequent_visible_experts=2)
    mixed = build_routing_mask(recipe, vocab_size=VOCAB_SIZE)
    row_of_id = mixed.row_of_id.copy()
    row_of_id[:, ::2] %= NUM_EXPERTS
    return RoutingMask(row_of_id, mixed.visible_bits, VOCAB_SIZE, NUM_EXPERTS, LAYERS, mixed.provenance)


@pytest.mark.parametrize(
    "recipe",
    [UpcycleSettings(NUM_EXPERTS), UpcycleSettings(NUM_EXPERTS, topk=3, moe_layer_freq=[0, 1, 1])],
    ids=["all layers", "some layers"],
)
@pytest.mark.parametrize("dense_format", ["hf", "megatron"])
def test_upcycled_models_compute_what_the_dense_model_computes(recipe, dense_format, mask, tmp_path, one_rank):
    dense = tmp_path / "hf"
    original = save_model("qwen3", dense)
    if dense_format == "megatron":
        dense = tmp_path / "megatron"
        to_megatron(tmp_path / "hf", dense)
    settings = Settings(load=dense, save=tmp_path / "upcycled", tokenizer_type="NullTokenizer")
    flags = upcycle_model(settings, recipe, mask, to_megatron=True)
    upcycle_model(replace(settings, save=tmp_path / "upcycled_hf"), recipe, mask, to_megatron=False)
    ids = random_ids()
    expected = logits_of(original, ids)
    for logits in (
        megatron_logits(tmp_path / "upcycled", flags, ids),
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "upcycled_hf"), ids),
    ):
        torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=0)
        assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command", "ranks"),
    [
        ("olmoe", "hf-to-megatron", 2),
        ("deepseek_v3, yarn", "hf-to-megatron", 2),
        ("llama", "upcycle", 1),
    ],
)
def test_training_starts_from_them(name, command, ranks, mask, tmp_path):
    """Training needs no flags about the model except those that the conversion prints."""
    save_model(name, tmp_path / "original")
    mask.save(tmp_path / "mask.safetensors")
    options = f"--routing-mask mask.safetensors --num-experts {NUM_EXPERTS}" if command == "upcycle" else ""
    words = f"{command} --load original --save imported --tokenizer-type NullTokenizer {options}".split()
    printed = run_maskmoe("convert", *words, cwd=tmp_path).stdout
    assert ("the model computes what the dense model computes" in printed) == (command == "upcycle")
    flags = printed.partition("load it with")[2]
    layout = "--tensor-model-parallel-size 2 --sequence-parallel" if ranks == 2 else ""
    data = f"--mock-data --split 100,0,0 --eval-iters 0 --log-interval 1 --save run --save-interval 2 {layout}"
    program = f"-m maskmoe.training.pretrain {flags} --tokenizer-type NullTokenizer {TRAINING} {data}"
    log = run_program(program, tmp_path, ranks)
    assert "successfully loaded checkpoint" in log
    assert "complete: 2 iterations" in log
