"""Exits 0 while a model that is initialised on the meta device keeps whatever the memory holds, 1 once fixed."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
from megatron.training.models import dist_utils
from megatron.training.utils.common_utils import to_empty_if_meta_device

torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN


def on_cpu(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Do what Megatron does, on a machine without CUDA."""
    return to_empty_if_meta_device(module, device=torch.device("cpu"))


config = SimpleNamespace(init_model_with_meta_device=True, use_cpu_initialization=True, fp16=False, bf16=False)
with torch.device("meta"):
    layer = torch.nn.Linear(4, 4)  # initialises its weights
with (
    patch.object(dist_utils, "to_empty_if_meta_device", on_cpu),
    patch.object(dist_utils, "_print_num_params"),
):
    (model,) = dist_utils.prepare_existing_model_chunks_for_distributed_training(
        [layer], config, None, wrap_with_ddp=False
    )
print("weights:", model.weight)
sys.exit(0 if model.weight.isnan().all() else 1)
