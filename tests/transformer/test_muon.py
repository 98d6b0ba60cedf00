"""Muon updates the matrices of experts and routers as it does in Megatron-Core's own model."""

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from support.small_moe import DEVICE, make_config, make_mask, make_model, take_metrics

from maskmoe.transformer.layer_specs import map_spec
from maskmoe.transformer.models import DenseGPTModel
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention
from maskmoe.transformer.torch_modules.norms import TorchNorm

SEQUENCE, VOCAB_SIZE, NUM_EXPERTS = 16, 20, 4
# Modules besides MoE layers that MaskMoE replaces. They, and the loss of `DenseGPTModel`, agree with Megatron's up to
# rounding.
OTHER_MODULES = {DotProductAttention: TorchDotProductAttention, WrappedTorchNorm: TorchNorm}


def model_config():
    return make_config(NUM_EXPERTS, num_layers=2, hidden_size=16, moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3)


def make_ours():
    return make_model(model_config(), make_mask(np.ones((2, VOCAB_SIZE, NUM_EXPERTS), bool)), SEQUENCE)


def make_stock() -> GPTModel:
    config = model_config()
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    spec = map_spec(spec, lambda node: OTHER_MODULES.get(node, node) if isinstance(node, type) else node)
    return DenseGPTModel(
        config, spec, vocab_size=VOCAB_SIZE, max_sequence_length=SEQUENCE, position_embedding_type="rope"
    ).to(DEVICE)


def train(model: GPTModel) -> None:
    """Make three steps with Muon.

    No gradients are clipped: Megatron sums a norm optimizer by optimizer, and MaskMoE always gives experts their own.
    """
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="muon", lr=0.02, clip_grad=0), [wrapped])
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(2, -1)
    for seed in range(3):
        take_metrics()
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        ids = torch.randint(0, VOCAB_SIZE, (2, SEQUENCE), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        wrapped(ids, positions, None, labels=ids.roll(-1, dims=1)).mean().backward()
        wrapped.finish_grad_sync()
        optimizer.step()


def test_all_visible_equals_stock() -> None:
    """Every id sees every expert, and both models start from the same weights."""
    ours, stock = make_ours(), make_stock()
    first = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    stock.load_state_dict({name: ours.state_dict()[name] for name in stock.state_dict()})
    for model in (ours, stock):
        train(model)
    theirs = dict(stock.named_parameters())
    assert first.keys() == theirs.keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert not torch.equal(parameter, first[name]), name
