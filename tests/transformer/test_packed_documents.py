"""Packed documents against the same documents one at a time."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from support.small_moe import (
    DEVICE,
    make_config,
    make_mask,
    make_visible_experts,
    process_groups,
    random_visible_sets,
)
from torch import Tensor

from maskmoe.transformer.gpt_model import MaskMoEGPTModel
from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec, get_maskmoe_mtp_block_spec
from maskmoe.transformer.packed_documents import PackedDocuments

NUM_LAYERS, VOCAB_SIZE, SEQUENCE = 2, 40, 16
MASK = make_mask(random_visible_sets(6, NUM_LAYERS + 2, VOCAB_SIZE, 4))
# The bounds of the documents of two samples; the second sample is one document.
BOUNDS = [[0, 1, 6, 13, 16], [0, 16]]
FP32_ORDER_OF_SUMS = 2e-5
MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "grouped queries": {"num_attention_heads": 4, "num_query_groups": 2},
    "bias of attention": {"add_qkv_bias": True, "softmax_type": "learnable"},
    "sliding window": {"window_size": (3, 0)},
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective recompute": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    "multi-token prediction": {"mtp_num_layers": 2},
}


def build_model(position_embedding_type: str = "rope", **settings: Any) -> MaskMoEGPTModel:
    torch.manual_seed(0)
    config = make_config(num_layers=NUM_LAYERS, hidden_size=16, **settings)
    visible_experts = make_visible_experts(config, MASK)
    return MaskMoEGPTModel(
        config,
        get_maskmoe_decoder_block_spec(config, visible_experts),
        mtp_block_spec=get_maskmoe_mtp_block_spec(config, visible_experts) if config.mtp_num_layers else None,
        visible_experts=visible_experts,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE,
        position_embedding_type=position_embedding_type,
        pg_collection=process_groups(),
    ).to(DEVICE)


def padded_bounds(samples: list[list[int]]) -> Tensor:
    """Return the bounds as `GPTDataset` does: int32 [samples, sequence + 1], the last bound repeated."""
    return torch.tensor([bounds + [SEQUENCE] * (SEQUENCE + 1 - len(bounds)) for bounds in samples], dtype=torch.int32)


def token_ids() -> tuple[Tensor, Tensor]:
    """Return ids and labels of two samples, int64 [2, sequence] each."""
    ids = torch.randint(0, VOCAB_SIZE, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


def packed_losses(model: MaskMoEGPTModel, samples: list[list[int]] = BOUNDS) -> Tensor:
    """Return the losses [2, sequence] of the packed samples."""
    ids, labels = token_ids()
    positions = torch.stack([torch.cat([torch.arange(end - start) for start, end in pairwise(b)]) for b in samples])
    documents = PackedDocuments.of_samples(padded_bounds(samples), ids.device, reads_on_host=True)
    return model(ids, positions.to(DEVICE), None, labels=labels, packed_seq_params=documents)


def losses_one_by_one(model: MaskMoEGPTModel, samples: list[list[int]] = BOUNDS) -> Tensor:
    """Return the losses [2, sequence], computed for one document at a time."""
    ids, labels = token_ids()
    losses = []
    for sample, bounds in enumerate(samples):
        for start, end in pairwise(bounds):
            document = slice(sample, sample + 1), slice(start, end)
            positions = torch.arange(end - start, device=DEVICE).unsqueeze(0)
            losses.append(model(ids[document], positions, None, labels=labels[document]).flatten())
    return torch.cat(losses).view(2, SEQUENCE)


def gradients(model: MaskMoEGPTModel, losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_equals_documents_one_by_one(name: str) -> None:
    model = build_model(**MODELS[name])
    packed, expected = packed_losses(model), losses_one_by_one(model)
    torch.testing.assert_close(packed, expected, rtol=0, atol=FP32_ORDER_OF_SUMS)
