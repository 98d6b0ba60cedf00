"""Exits 0 while the optimizer SGD cannot build its state for loading a checkpoint, 1 once fixed."""

import sys
from types import SimpleNamespace

import torch
from megatron.core.optimizer import OptimizerConfig, _get_megatron_optimizer_based_on_param_groups
from megatron.core.optimizer.optimizer import FP32Optimizer

parameter = torch.nn.Parameter(torch.ones(4))
groups = [
    {"params": [parameter], "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
]
config = OptimizerConfig(optimizer="sgd", lr=0.1, min_lr=0.1)
optimizer, init_state_fn = _get_megatron_optimizer_based_on_param_groups(
    config, [], groups, skip_megatron_wrapping=True
)
try:  # as the wrapper of this optimizer does before a checkpoint is read
    FP32Optimizer.sharded_state_dict(
        SimpleNamespace(optimizer=optimizer, init_state_fn=init_state_fn, config=config), {}, is_loading=True
    )
except TypeError as error:
    print(f"loading a checkpoint with --optimizer sgd: {error}")
    sys.exit(0)
sys.exit(1)
