"""Transformer Engine's permutation kernels in Triton's interpreter: `python triton_permutation_ranks.py FOLDER`.

Tokens have 0 to 3 experts. The script writes inputs and results to `results.pt`.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
from maskmoe.megatron_compat import cpu, prepare_process

cpu.install(hidden=())
prepare_process()
import torch
from support.rank_program import run_as_rank
from transformer_engine.common.triton import permutation as kernels
from transformer_engine.pytorch.triton import permutation

TOKENS, EXPERTS, HIDDEN, CHUNKS = 30, 5, 70, 6


def skip_autotuning() -> None:
    """Leave each kernel one configuration, which needs no measurement."""
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]


def main() -> None:
    skip_autotuning()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    num_chosen = torch.arange(TOKENS) % 4
    rank_of_expert = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1).argsort(dim=1)
    routing_map = rank_of_expert < num_chosen[:, None]
    routing_map[:, 2] = False  # an expert without tokens
    probs = torch.rand(TOKENS, EXPERTS, generator=generator) * routing_map
    num_rows = int(routing_map.sum())
    # `CopyToExperts` passes this rank's columns of all experts.
    routing_map, probs = (torch.nn.functional.pad(each, (2, 3))[:, 2:-3] for each in (routing_map, probs))

    row_id_map = permutation.make_row_id_map(routing_map, TOKENS, EXPERTS)
    rows, _, row_probs = permutation.permute_with_mask_map(
        hidden, row_id_map, probs, None, None, TOKENS, EXPERTS, num_rows, HIDDEN, 0
    )
    sums, unpermuted_probs = permutation.unpermute_with_mask_map(
        rows, row_id_map, None, row_probs, None, TOKENS, EXPERTS, HIDDEN
    )
    sizes, order = torch.tensor([3, 0, 4, 1, 0, num_rows - 8]), torch.randperm(CHUNKS, generator=generator)
    chunk_map = permutation.make_chunk_sort_map(sizes, order, num_rows, CHUNKS)
    sorted_rows, sorted_probs = permutation.sort_chunks_by_map(rows, chunk_map, row_probs, num_rows, HIDDEN, True)
    results = {
        **{"hidden": hidden, "routing_map": routing_map, "probs": probs},
        **{"rows": rows, "row_probs": row_probs, "sums": sums, "unpermuted_probs": unpermuted_probs},
        **{"sizes": sizes, "order": order, "sorted_rows": sorted_rows, "sorted_probs": sorted_probs},
    }
    torch.save(results, Path(sys.argv[1]) / "results.pt")


if __name__ == "__main__":
    run_as_rank(main)
