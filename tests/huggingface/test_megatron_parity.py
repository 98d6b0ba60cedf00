"""Megatron's model and the transformers model converted from it compute the same logits."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.training.arguments import parse_args, validate_args
from support.converted_models import build_model
from support.small_moe import DEVICE, make_mask, random_visible_sets
from support.tensors import assert_same_tensors, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.settings import Settings
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.training.settings.arguments import add_maskmoe_arguments

pytestmark = pytest.mark.usefixtures("one_rank")

VOCAB_SIZE = 100
NUM_EXPERTS = 8
NUM_LAYERS = 3
SETTINGS = f"""
    --num-layers {NUM_LAYERS} --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2
    --num-experts {NUM_EXPERTS} --moe-ffn-hidden-size 24
    --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE - 1} --data-path none
"""
GQA = "--group-query-attention --num-query-groups 2"
UNTIED = "--untie-embeddings-and-output-weights"
SHARED = "--moe-shared-expert-intermediate-size 20"
LATENT = "--multi-latent-attention --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 10"
YARN = "--rope-type yarn --rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 1.1"
DENSE_FIRST = "--moe-layer-freq [0,1,1] --ffn-hidden-size 40"
SIGMOID = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5"


@dataclass(frozen=True)
class Case:
    """A model to compare.

    Attributes:
        num_visible: the numbers of experts that ids see.
        topk: k.
        flags: further flags of Megatron.
        masks_moe_layers: the routing mask has a table for each MoE layer only.
    """

    num_visible: tuple[int, ...]
    topk: int
    flags: str = ""
    masks_moe_layers: bool = False


CASES = [
    *(
        Case((num_visible,), topk, f"{flags}{' --moe-router-pre-softmax' if topk == 1 else ''}")
        for num_visible in (1, 4, NUM_EXPERTS)
        for topk in (1, 2)
        for flags in ("", f"{UNTIED} {GQA} {SHARED}")
    ),
    Case((1, 4), 2, f"{SHARED} --moe-shared-expert-gate --moe-router-pre-softmax"),
    Case((1, 4), 2, f"{GQA} --moe-layer-freq [0,1,1] --ffn-hidden-size 40"),
    Case((1, 2, 5), 4, f"{SIGMOID} --moe-router-num-groups 4 --moe-router-group-topk 2"),
    Case((1, 4), 2, f"{UNTIED} --qk-layernorm --add-qkv-bias --rotary-percent 0.5 --rotary-base 500"),
    Case((1, 4), 2, f"{GQA} --qk-layernorm --qk-layernorm-all-heads --kv-channels 12"),
    # Models with multi-latent attention or multi-token prediction.
    Case((1, 4), 2, f"{LATENT} {YARN} --q-lora-rank 16 --qk-layernorm {SHARED} {DENSE_FIRST} {SIGMOID}"),
    Case((1, 4), 2, f"{LATENT} --rope-type rope --qk-layernorm {UNTIED} {SHARED} --mtp-num-layers 1"),
    Case((1, 4), 2, f"{LATENT} --q-lora-rank 16 {DENSE_FIRST} --mtp-num-layers 2 --mtp-use-repeated-layer"),
    Case((1, 4), 2, f"{GQA} {UNTIED} {DENSE_FIRST} --mtp-num-layers 2 --moe-router-pre-softmax"),
    Case((1, 4), 2, f"{GQA} {DENSE_FIRST}", masks_moe_layers=True),
    # Hybrid models.
    Case(
        (1, 4),
        2,
        f"--num-layers 4 --hybrid-layer-pattern *E*E {GQA} {UNTIED} {SHARED} --rotary-percent 0.5 --rotary-base 500",
    ),
    Case(
        (1, 4),
        2,
        f"--num-layers 4 --hybrid-layer-pattern *-*E/*E --ffn-hidden-size 40 {SIGMOID} --qk-layernorm --add-qkv-bias",
        masks_moe_layers=True,
    ),
    Case((1, 4), 2, "--num-layers 6 --hybrid-layer-pattern *E*-*E/*E/*E --ffn-hidden-size 40 --mtp-use-repeated-layer"),
    Case(
        (1, 4),
        2,
        f"--num-layers 4 --hybrid-layer-pattern +-+E/+E {LATENT} --q-lora-rank 16 --rope-type rope --qk-layernorm",
        masks_moe_layers=True,
    ),
]


def parse(flags: str) -> Namespace:
    """Return Megatron's arguments as a run would save them."""
    with mock.patch.object(sys, "argv", ["pretrain", *SETTINGS.split(), *flags.split()]):
        args = validate_args(parse_args(add_maskmoe_arguments))
    args.padded_vocab_size = 128
    return args


def build(case: Case, folder: Path) -> tuple[Namespace, torch.nn.Module]:
    """Build Megatron's model with random weights; return its arguments and the model."""
    mask_file = folder / "mask.safetensors"
    args = parse(f"--routing-mask {mask_file} --moe-router-topk {case.topk} {case.flags}")
    layers = FeedForwardLayers.of_args(args)
    num_tables = layers.num_moe_layers if case.masks_moe_layers else len(layers.has_experts)
    make_mask(random_visible_sets(0, num_tables, VOCAB_SIZE, NUM_EXPERTS, case.num_visible)).save(mask_file)
    torch.manual_seed(0)
    model = build_model(args).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start out as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn_like(buffer) / 4)
    return args, model


def random_tokens(seed: int) -> Tensor:
    """Draw token ids, int64 [batch, sequence]."""
    return torch.randint(0, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def position_ids(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def export(case: Case, folder: Path) -> tuple[torch.nn.Module, Path, Path]:
    """Save Megatron's model of a case and export it; return the model, its checkpoint and the transformers model."""
    args, megatron = build(case, folder)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    dist_checkpointing.save(megatron.sharded_state_dict() | {"args": args, "iteration": 1}, str(checkpoint))
    megatron_to_huggingface(Settings(load=checkpoint, save=folder / "exported"))
    return megatron, checkpoint, folder / "exported"


def check_logits(megatron: torch.nn.Module, exported: Path) -> None:
    """Compare the logits of Megatron's model and of the transformers model."""
    transformers, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    tokens = random_tokens(seed=1)
    with torch.no_grad():
        expected = megatron.eval()(tokens, position_ids(tokens), None)[..., :VOCAB_SIZE]
        logits = transformers.to(DEVICE)(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_logits_and_the_same_checkpoint_again(case: Case, tmp_path) -> None:
    """Converting back restores all tensors bit for bit, including multi-token prediction, which is kept beside."""
    megatron, checkpoint, exported = export(case, tmp_path)
    check_logits(megatron, exported)
    huggingface_to_megatron(Settings(load=exported, save=tmp_path / "back", max_shard_size=20_000))
    original, back = tensors_of(checkpoint), tensors_of(tmp_path / "back" / "release")
    has_prediction = "--mtp-num-layers" in case.flags or "/" in case.flags
    assert any(name.startswith("mtp.layers.0.") for name in original) == has_prediction
    assert_same_tensors(original, back)
