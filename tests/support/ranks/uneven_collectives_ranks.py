"""One rank that checks collectives of tensors of different sizes: `python … FOLDER`, with RANK and WORLD_SIZE set."""

import os
import sys

import torch
from support.rank_program import run_as_rank
from torch import distributed

from maskmoe.megatron_compat import cpu


def check_all_gather(sizes: list[int], columns: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [torch.arange(size * 3 + rank).to(dtype)[: size * 3] + rank for rank, size in enumerate(sizes)]
    parts = [part.view(size, 3) if columns else part[:size] for part, size in zip(parts, sizes, strict=True)]
    outputs = [torch.full_like(part, 99) for part in parts]
    distributed.all_gather(outputs, parts[distributed.get_rank()])
    assert all(torch.equal(output, part) for output, part in zip(outputs, parts, strict=True))


def check_reduce_scatter(sizes: list[int]) -> None:
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    inputs = [torch.arange(size, dtype=torch.float32) + 10 * index for index, size in enumerate(sizes)]
    kept = [part.clone() for part in inputs]
    output = torch.empty(sizes[rank])
    distributed.reduce_scatter(output, [(rank + 1) * part for part in inputs])
    assert torch.equal(output, sum(range(1, num_ranks + 1)) * inputs[rank])
    distributed.reduce_scatter(output, inputs, op=distributed.ReduceOp.MAX)
    assert torch.equal(output, inputs[rank])
    assert all(torch.equal(part, before) for part, before in zip(inputs, kept, strict=True))


def main() -> None:
    cpu.install()
    distributed.init_process_group(
        init_method=f"file://{sys.argv[1]}/rendezvous",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    for sizes in ([2, 2], [1, 4], [5, 2], [0, 3], [3, 0]):
        for columns in ((), (3,)):
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                check_all_gather(sizes, columns, dtype)
        check_reduce_scatter(sizes)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
