"""Pretraining on the CPU with a stub of Transformer Engine, which computes in plain torch."""

import sys
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parents[1]))
from support import stub_transformer_engine

if __name__ == "__main__":
    stub_transformer_engine.install()
from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch

from maskmoe.processes.run_tool import run_tool
from maskmoe.training.trainer import main

if __name__ == "__main__":
    # Megatron refuses grouped experts on devices that have no such kernels.
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
        run_tool(main)
