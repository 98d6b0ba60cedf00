"""The schedule of `--overlap-moe-expert-parallel-comm` against forward and backward passes one at a time."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from support import small_moe as moe
from support import stub_deepep
from support.launchers import RunRanks
from torch import Tensor

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.models import MaskMoEGPTModel

NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH = 2, 8, 16, 8, 2
DISPATCHERS = {
    "alltoall": {},
    "flex": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
}


def build_model(**settings: Any) -> MaskMoEGPTModel:
    """Build a model in bf16 with a balancing loss and shared experts."""
    config = moe.make_config(
        NUM_EXPERTS,
        num_layers=NUM_LAYERS,
        expert_model_parallel_size=2,
        params_dtype=torch.bfloat16,
        bf16=True,
        moe_aux_loss_coeff=1e-2,
        moe_shared_expert_intermediate_size=4,
        overlap_moe_expert_parallel_comm=True,
        **settings,
    )
    mask = moe.make_mask(moe.random_visible_sets(0, NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS))
    visible_experts = moe.make_visible_experts(config, mask)
    spec = get_maskmoe_decoder_block_spec(config, visible_experts)
    torch.manual_seed(0)
    return MaskMoEGPTModel(
        config,
        spec,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        visible_experts=visible_experts,
    ).bfloat16()


def train(model: MaskMoEGPTModel, micro_batches: list[dict[str, Any]], is_overlapped: bool) -> list[Tensor]:
    """Return the losses of micro-batches and the gradients; overlapped, with the forward pass of the next one."""
    model.zero_grad()
    gradient = torch.ones(BATCH, SEQUENCE)
    if not is_overlapped:
        losses = [model(**micro_batch) for micro_batch in micro_batches]
        for loss in losses:
            loss.backward(gradient)
    else:
        plans: list[Any] = [model.build_schedule_plan(**micro_batch) for micro_batch in micro_batches]
        run = type(plans[0]).run
        losses = [run(plans[0], None)]
        for previous, plan in pairwise(plans):
            losses.append(run(plan, previous, b_grad=gradient))
        run(None, plans[-1], b_grad=gradient)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*(loss.detach() for loss in losses), *gradients]


def compare_on_rank() -> None:
    stub_deepep.install()
    moe.initialize_parallelism(expert_model_parallel_size=2)
    torch.manual_seed(1 + torch.distributed.get_rank())
    micro_batches = []
    for _ in range(3):
        ids, labels = torch.randint(0, VOCAB_SIZE, (2, BATCH, SEQUENCE))
        positions = torch.arange(SEQUENCE).expand(BATCH, -1)
        padding = torch.rand(BATCH, SEQUENCE) < 0.2
        micro_batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "padding_mask": padding}
        micro_batches.append({**micro_batch, "attention_mask": None})
    for name, settings in DISPATCHERS.items():
        model = build_model(**settings)
        one_at_a_time = train(model, micro_batches, is_overlapped=False)
        overlapped = train(model, micro_batches, is_overlapped=True)
        assert len(overlapped) == len(one_at_a_time) > len(micro_batches)
        for found, expected in zip(overlapped, one_at_a_time, strict=True):
            assert torch.equal(found, expected), name


def test_overlapped_passes_compute_the_same_bits(tmp_path: Path, run_ranks: RunRanks) -> None:
    run_ranks(compare_on_rank, tmp_path)
