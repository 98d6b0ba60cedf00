"""One rank of a layer with a gated delta net: `python gated_delta_net_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

In each layout of as many ranks, the script loads the parameters from the checkpoint FOLDER/parameters. It writes output
and gradient of the input to `LAYOUT-rankR.safetensors`, and the gradients of the parameters as a checkpoint of the
layer, FOLDER/LAYOUT.
"""

import os
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from safetensors.torch import save_file
from support.gated_delta_net import HIDDEN, RECOMPUTE, make_gated_delta_net, run_layer
from support.small_moe import process_groups
from torch import Tensor

SEQUENCE, BATCH = 160, 2
LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "tensor and context": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "recomputed": RECOMPUTE}


def cases(num_ranks: int) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """Yield the name, the sizes of the process groups and the further settings of the cases for a number of ranks."""
    for layout, sizes in LAYOUTS.items():
        if prod(sizes.values()) == num_ranks:
            yield from ((f"{layout}, {name}", sizes, settings) for name, settings in SETTINGS.items())


def whole_batch() -> tuple[Tensor, Tensor]:
    """Draw hidden states and a gradient, each [sequence, batch, hidden]."""
    generator = torch.Generator().manual_seed(1)
    hidden, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator)
    return hidden, gradient


def part_of_rank(tensor: Tensor, tp_size: int, tp_rank: int, cp_size: int, cp_rank: int) -> Tensor:
    """Return a rank's part of a sequence [sequence, ...].

    Context-parallel ranks take one chunk from each end of the sequence; tensor-parallel ranks divide what is left.
    """
    chunks = tensor.chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[-1 - cp_rank]]).chunk(tp_size)[tp_rank]


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    for name, sizes, settings in cases(num_ranks):
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(1)
        groups = process_groups()
        place = (groups.tp.size(), groups.tp.rank(), groups.cp.size(), groups.cp.rank())
        layer = make_gated_delta_net(**sizes, sequence_parallel="tensor_model_parallel_size" in sizes, **settings)
        layer.load_state_dict(dist_checkpointing.load(layer.sharded_state_dict(), str(folder / "parameters")))
        results = run_layer(layer, *(part_of_rank(tensor, *place).contiguous() for tensor in whole_batch()))
        save_file({key: results[key] for key in ("output", "input")}, folder / f"{name}-rank{rank}.safetensors")
        for parameter in layer.parameters():
            # Megatron's `finalize_model_grads` and its data parallelism add the gradients up.
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad, group=groups.tp)
            torch.distributed.all_reduce(parameter.grad, group=groups.cp)
            parameter.data.copy_(parameter.grad)
        if rank == 0:
            (folder / name).mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(layer.sharded_state_dict(), str(folder / name))
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
