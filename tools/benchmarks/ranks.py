"""Benchmarks that run as one process, or as several under torchrun."""

import logging
import os
import sys

import torch

# Prepares the process, hence before megatron.
import maskmoe.training  # noqa: F401

# isort: split
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection


def join_ranks() -> ProcessGroupCollection:
    """The process groups of this rank; all ranks are expert-parallel. One thread each, and no chatter."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    torch.distributed.init_process_group("gloo" if "maskmoe.cpu" in sys.modules else "nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=torch.distributed.get_world_size())
    return ProcessGroupCollection.use_mpu_process_groups()
