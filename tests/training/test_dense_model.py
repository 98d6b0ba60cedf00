"""Without experts, the model builder makes the model that Megatron-Core's builder makes."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from maskmoe.training.model.model_builder import MaskMoEGPTModelBuilder, MaskMoEModelConfig, model_config_from_args
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.transformer.models import DenseGPTModel

VOCAB_SIZE = 128
SEQUENCE = 16


def build(builder: Callable[[GPTModelConfig], Any], **further: Any) -> GPTModel:
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0,
        hidden_dropout=0,
        use_cpu_initialization=True,
        transformer_impl="local",
    )
    settings = GPTModelConfig(transformer=transformer, vocab_size=VOCAB_SIZE, seq_length=SEQUENCE, **further)
    torch.manual_seed(1)
    return builder(settings).build_model(ProcessGroupCollection.use_mpu_process_groups())


def test_model_without_experts_is_megatrons(one_rank):
    ours = build(lambda settings: MaskMoEGPTModelBuilder(MaskMoEModelConfig(megatron=settings)))
    theirs = build(GPTModelBuilder)
    assert type(ours) is DenseGPTModel
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    tensors = [[value for value in state.values() if isinstance(value, torch.Tensor)] for state in states]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    ids = torch.randint(VOCAB_SIZE, (2, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(2, -1)
    losses = [model(ids, positions, None, labels=ids.roll(-1, 1)) for model in (ours, theirs)]
    # Attention and loss add up in another order.
    torch.testing.assert_close(*losses, rtol=2e-6, atol=0)


def test_factor_of_rope_scaling_is_that_of_the_command_line(monkeypatch):
    flags = """--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8
        --micro-batch-size 1 --vocab-size 100 --position-embedding-type rope
        --use-rope-scaling --rope-scaling-factor 32"""
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags.split()])
    config = model_config_from_args(validate_args(parse_args(add_maskmoe_arguments)))
    assert config.rope_scaling
    assert config.rope_scaling_factor == 32
