"""One rank with a part of the logits: `python cross_entropy_ranks.py FOLDER`, with RANK and WORLD_SIZE set."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from safetensors.torch import save_file
from support.rank_program import run_as_rank
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.torch_modules.cross_entropy import vocab_parallel_cross_entropy

VOCAB_SIZE = 64


def values_of(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logits [sequence, batch, vocabulary], targets and the gradient of the losses, [sequence, batch] each."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 2, VOCAB_SIZE, generator=generator)
    target = torch.randint(VOCAB_SIZE, (12, 2), generator=generator)
    gradient = torch.randn(12, 2, generator=generator)
    return logits.to(device, dtype), target.to(device), gradient.to(device)


def results(
    cross_entropy: Callable, logits: Tensor, target: Tensor, gradient: Tensor, group: ProcessGroup
) -> dict[str, Tensor]:
    """Return the losses and the gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, target, tp_group=group)
    return {"losses": losses.detach(), "gradient": torch.autograd.grad(losses, leaf, gradient)[0]}


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    group = torch.distributed.group.WORLD
    assert group is not None
    saved = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, gradient = values_of(dtype, torch.device("cpu"))
        mine = logits.chunk(num_ranks, dim=-1)[rank].contiguous()
        found = results(vocab_parallel_cross_entropy, mine, target, gradient, group)
        saved |= {f"{dtype}/{name}": value.contiguous() for name, value in found.items()}
    save_file(saved, folder / f"rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
