"""One rank that counts the costs of dispatch: `python dispatch_cost_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

The script runs a model of several layers forward and backward, and writes the counts of `tools/benchmarks/meter.py` for
each case to `rankR.json`.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskmoe.megatron_compat import prepare_process

prepare_process()
import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from meter import Cost, cost_of
from support.rank_program import run_as_rank
from support.small_moe import DEVICE, make_config, make_mask, make_model, random_visible_sets

NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE, TOKENS, HIDDEN = 3, 8, 11, 16, 8
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "planned": (True, {}),
    "planned_recomputed": (True, RECOMPUTE),
    "one_copy": (False, {}),
}


def visible_sets(is_rank_local: bool) -> np.ndarray:
    """Return visible sets, bool [layers, vocab, N]: rank-local for two ranks, or all experts for every id."""
    visible = np.ones((NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS), bool)
    if is_rank_local:
        half = NUM_EXPERTS // 2
        drawn = random_visible_sets(1, NUM_LAYERS, VOCAB_SIZE, half)
        is_first = np.random.default_rng(2).random((NUM_LAYERS, VOCAB_SIZE, 1)) < 0.5
        visible = np.concatenate([drawn & is_first, drawn & ~is_first], axis=-1)
    return visible


def count(is_rank_local: bool, settings: dict[str, Any], rank: int) -> Cost:
    """Run a case forward and backward and return its cost; arguments as in `CASES`."""
    config = make_config(
        NUM_EXPERTS, topk=2, num_layers=NUM_LAYERS, hidden_size=HIDDEN, expert_model_parallel_size=2, **settings
    )
    model = make_model(config, make_mask(visible_sets(is_rank_local)), TOKENS)
    ids = torch.from_numpy(np.random.default_rng(rank).integers(0, VOCAB_SIZE, (1, TOKENS))).to(DEVICE)
    position_ids = torch.arange(TOKENS, device=DEVICE).unsqueeze(0)
    # Compute logits only, because cross entropy has collectives of its own.
    return cost_of(lambda: model(ids, position_ids, None).mean().backward())


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)
    model_parallel_cuda_manual_seed(1)
    costs = {name: asdict(count(*case, rank)) for name, case in CASES.items()}
    (folder / f"rank{rank}.json").write_text(json.dumps(costs))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
