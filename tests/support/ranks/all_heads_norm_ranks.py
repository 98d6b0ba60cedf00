"""One rank with norms over all heads: `python all_heads_norm_ranks.py FOLDER`, with RANK and WORLD_SIZE set."""

import os
import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from safetensors.torch import save_file
from support.rank_program import run_as_rank
from support.small_moe import make_config
from torch import Tensor

from maskmoe.transformer.torch_modules.norms import AllHeadsRMSNorm

SEQUENCE, BATCH, HEAD_DIM = 5, 2, 8
# Numbers of heads of the model: three for each of two ranks, one for each rank, and one that both ranks hold.
NUM_HEADS = (6, 2, 1)
EPSILON = 1e-2


def values_of(num_heads: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw heads, a weight, and a gradient for the output of each rank.

    Returns:
        heads [sequence, batch, heads, features]; weight [heads * features]; gradients [ranks, sequence, batch, heads,
        features], 0 for heads that a rank does not hold.
    """
    generator = torch.Generator().manual_seed(num_heads)
    heads = torch.randn(SEQUENCE, BATCH, num_heads, HEAD_DIM, generator=generator)
    weight = torch.randn(num_heads * HEAD_DIM, generator=generator)
    gradients = torch.randn(num_ranks, SEQUENCE, BATCH, num_heads, HEAD_DIM, generator=generator)
    for rank in range(num_ranks):
        held = torch.zeros(num_heads, 1)
        held[heads_of(rank, num_heads, num_ranks)] = 1
        gradients[rank] *= held
    return heads, weight, gradients


def heads_of(rank: int, num_heads: int, num_ranks: int) -> slice:
    """Return the heads that a rank holds."""
    first = rank * num_heads // num_ranks
    return slice(first, first + max(1, num_heads // num_ranks))


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    results = {}
    for num_heads in NUM_HEADS:
        heads, weight, gradients = values_of(num_heads, num_ranks)
        mine = heads_of(rank, num_heads, num_ranks)
        norm = AllHeadsRMSNorm(
            make_config(), HEAD_DIM, EPSILON, num_heads=num_heads, tp_group=torch.distributed.group.WORLD
        )
        norm.weight.data.copy_(weight)
        local = heads[:, :, mine].clone().requires_grad_()
        output = norm(local)
        output.backward(gradients[rank][:, :, mine])
        results |= {
            f"{num_heads}/output": output.detach(),
            f"{num_heads}/input_grad": local.grad,
            f"{num_heads}/weight_grad": norm.weight.grad,
        }
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
