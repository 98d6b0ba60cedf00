"""One rank of FSDP2 in transformers: `python fsdp_export_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

The ranks load the model FOLDER/model, divide its weights, and save it to FOLDER/saved.
"""

import os
import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from support.rank_program import run_as_rank
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import maskmoe.huggingface  # noqa: F401  registers the model


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    distributed = DistributedConfig(fsdp_size=num_ranks)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=distributed)
    assert isinstance(model, FSDPModule)
    model.save_pretrained(folder / "saved")
    assert type(model).__name__ == "FSDPMaskMoEForCausalLM"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
