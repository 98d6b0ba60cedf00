"""One data-parallel rank of experts: `python grouped_experts_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

Needs TRITON_INTERPRET=1.
"""

import os
import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import SequentialMLP
from safetensors.torch import save_file
from support.kernels import kernels_on_cpu
from support.rank_program import run_as_rank
from support.small_experts import make_experts, make_rows
from support.small_moe import make_config
from torch import Tensor

from maskmoe.transformer.experts import GroupedMLP

TOKENS_PER_EXPERT = {0: [4, 0, 3, 2], 1: [0, 5, 0, 1]}
"""Rows of the experts on each rank."""


def reduced_gradients(kind: type[SequentialMLP], dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """Return `main_grad` of all parameters after two micro-batches, the second with overlapping reduction."""
    experts = make_experts(kind, make_config(params_dtype=dtype, bf16=dtype == torch.bfloat16))
    for parameter in experts.parameters():
        parameter.allreduce = False  # Megatron's mark of parameters of experts.
    # Buckets hold two or three weights, so that a bucket is reduced while other gradients are still missing.
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=250)
    model = DistributedDataParallel(experts.config, ddp_config, experts)
    assert len(model.expert_parallel_bucket_groups) > 1
    tokens_per_expert = TOKENS_PER_EXPERT[rank]
    for micro_batch in range(2):
        with model.no_sync() if micro_batch == 0 else torch.enable_grad():
            rows, probs, gradient = make_rows(experts, tokens_per_expert, seed=10 * rank + micro_batch)
            model(rows, torch.tensor(tokens_per_expert), probs)[0].backward(gradient)
    model.finish_grad_sync()
    assert all(parameter.grad is None for parameter in experts.parameters())
    return {name: parameter.main_grad.clone() for name, parameter in experts.named_parameters()}


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        with kernels_on_cpu():
            found = reduced_gradients(GroupedMLP, dtype, rank)
        expected = reduced_gradients(SequentialMLP, dtype, rank)
        results |= {f"{dtype}/found/{name}": gradient for name, gradient in found.items()}
        results |= {f"{dtype}/expected/{name}": gradient for name, gradient in expected.items()}
    save_file(results, folder / f"rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
