"""Megatron's model and the transformers model converted from it compute the same logits."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.training.arguments import parse_args, validate_args
from support.small_moe import DEVICE, make_mask, random_visible_sets
from torch import Tensor
from transformers import AutoModelForCausalLM

from maskmoe.conversion.convert import megatron_to_huggingface
from maskmoe.conversion.settings import Settings
from maskmoe.routing_mask import RoutingMask
from maskmoe.training.arguments import add_maskmoe_arguments
from maskmoe.training.model_builder import MaskMoEGPTModelBuilder
from maskmoe.training.setup import model_config_from_args

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
SIGMOID = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5"


@dataclass(frozen=True)
class Case:
    """A model to compare.

    Attributes:
        num_visible: the numbers of experts that ids see.
        topk: k.
        flags: further flags of Megatron.
        trained: train the model for some steps before the comparison.
    """

    num_visible: tuple[int, ...]
    topk: int
    flags: str = ""
    trained: bool = False

    def __str__(self) -> str:
        visible = "or".join(map(str, self.num_visible))
        return f"V={visible} k={self.topk} {self.flags}{' trained' if self.trained else ''}"


CASES = [
    *(
        Case((num_visible,), topk, f"{flags}{' --moe-router-pre-softmax' if topk == 1 else ''}", trained)
        for num_visible in (1, 4, NUM_EXPERTS)
        for topk in (1, 2)
        for flags in ("", f"{UNTIED} {GQA} {SHARED}")
        for trained in (False, True)
    ),
    Case((1, 4), 2, f"{SHARED} --moe-shared-expert-gate --moe-router-pre-softmax"),
    Case((1, 4), 2, f"{GQA} --moe-layer-freq [0,1,1] --ffn-hidden-size 40"),
    Case((1, 2, 5), 4, f"{SIGMOID} --moe-router-num-groups 4 --moe-router-group-topk 2"),
    Case((1, 4), 2, f"{UNTIED} --qk-layernorm --add-qkv-bias --rotary-percent 0.5 --rotary-base 500", trained=True),
    Case((1, 4), 2, f"{GQA} --qk-layernorm --qk-layernorm-all-heads --kv-channels 12"),
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
    make_routing_mask(case).save(mask_file)
    flags = f"--routing-mask {mask_file} --moe-router-topk {case.topk} {case.flags}"
    args = parse(flags)
    torch.manual_seed(0)
    builder = MaskMoEGPTModelBuilder(model_config_from_args(args))
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start out as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn_like(buffer) / 4)
    return args, model


def make_routing_mask(case: Case) -> RoutingMask:
    return make_mask(random_visible_sets(0, NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS, case.num_visible))


def random_tokens(seed: int) -> Tensor:
    """Draw token ids, int64 [batch, sequence]."""
    return torch.randint(0, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def position_ids(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def train(model: torch.nn.Module) -> None:
    """Train a model for 20 steps on two batches, so that it begins to remember them."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=DEVICE))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        tokens = random_tokens(seed=step % 2)
        loss = model(tokens, position_ids(tokens), None, labels=tokens.roll(-1, dims=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_logits(case: Case, tmp_path) -> None:
    args, megatron = build(case, tmp_path)
    if case.trained:
        train(megatron)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    dist_checkpointing.save(megatron.sharded_state_dict() | {"args": args, "iteration": 1}, str(checkpoint))
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "exported"))
    transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").to(DEVICE)
    tokens = random_tokens(seed=1)
    with torch.no_grad():
        expected = megatron.eval()(tokens, position_ids(tokens), None)[..., :VOCAB_SIZE]
        logits = transformers(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(dim=-1), expected.argmax(dim=-1))
