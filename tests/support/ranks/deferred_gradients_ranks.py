"""One rank of MoE layers whose experts defer their weights' gradients: `python deferred_gradients_ranks.py FOLDER`.

The experts are Transformer Engine's, as the stub has them. The script writes each layer's kind of dispatch, and the
gradients of its experts and of its input, to `rankR.pt`.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from support import stub_transformer_engine
from support.rank_program import run_as_rank

if __name__ == "__main__":
    stub_transformer_engine.install()
from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from support.small_moe import draw_parameters, make_config, make_layer, make_mask, process_groups
from torch import Tensor

from maskmoe.transformer.dispatch.planned import DispatchPlanner
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN, TOPK = 4, 8, 6, 2, 8, 2
MASKS = ("all_ranks", "rank_local")
WAYS = ("computed", "deferred")


def visible_sets(mask: str) -> Tensor:
    """Return visible sets, bool [1, vocab, N]: all experts, or the two experts of one rank."""
    rank_of_id, rank_of_expert = torch.arange(VOCAB_SIZE) % 2, torch.arange(NUM_EXPERTS) // 2
    return ((rank_of_id[:, None] == rank_of_expert) | (mask == "all_ranks")).unsqueeze(0)


def build_layer(mask: str, way: str, **settings) -> MaskMoELayer:
    """Build a layer in one of `WAYS`: experts compute all gradients in the backward pass, or defer some."""
    config = make_config(
        NUM_EXPERTS,
        TOPK,
        expert_model_parallel_size=2,
        transformer_impl="transformer_engine",
        moe_grouped_gemm=True,
        **settings,
        overlap_dispatch_backward_with_experts_wgrad=way == "deferred",
    )
    layer = make_layer(config, make_mask(visible_sets(mask).numpy()))
    draw_parameters(layer)
    return layer


def run_backward(layer: MaskMoELayer, call: torch.nn.Module, rank: int, seed: int = 0) -> Tensor:
    """Run forward and backward on one batch of this rank; return the gradient of the input."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    ids = TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator))
    planner = DispatchPlanner(layer.router.visible_experts, TOPK, [0], process_groups().ep)
    if layer.router.visible_experts.is_rank_local:
        ids = replace(ids, plan=planner.plan(ids))
    hidden, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator)
    call(hidden.requires_grad_(), padding_mask=pack_token_ids(ids))[0].backward(gradient)
    return hidden.grad


def gradients_alone(mask: str, way: str, rank: int) -> dict[str, Tensor | str]:
    """Return the results of a layer without data parallelism."""
    layer = build_layer(mask, way)
    input_grad = run_backward(layer, layer, rank)
    of_experts = {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
    return {"dispatcher": type(layer.dispatcher).__name__, "input": input_grad, **of_experts}


def gradients_of_data_parallelism(way: str, fused: bool, overlap: bool, rank: int) -> dict[str, Tensor]:
    """Return the gradients that the optimizer sees after two micro-batches of the second step."""
    layer = build_layer("all_ranks", way, gradient_accumulation_fusion=fused)
    ddp = DistributedDataParallel(layer.config, DistributedDataParallelConfig(overlap_grad_reduce=overlap), layer)
    for step in range(2):  # Megatron overlaps the reduction from the second step on.
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            run_backward(layer, ddp, rank, 2 * step)
        run_backward(layer, ddp, rank, 2 * step + 1)
        ddp.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in layer.experts.named_parameters()}


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    results = {(mask, way): gradients_alone(mask, way, rank) for mask in MASKS for way in WAYS}
    for way, fused, overlap in (
        ("computed", True, False),
        ("deferred", True, False),
        ("deferred", False, False),
        ("deferred", True, True),
    ):
        results[way, fused, overlap] = gradients_of_data_parallelism(way, fused, overlap, rank)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
