"""Pretraining on the CPU, in the branches of GPUs."""

import sys
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.processes.run_tool import run_tool
from maskmoe.training.trainer import main

sys.path.append(str(Path(__file__).parents[1]))
from support.places import take_gpu_branches

if __name__ == "__main__":
    take_gpu_branches()
    run_tool(main)
