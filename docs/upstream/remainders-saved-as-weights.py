"""Exits 0 while remainders of bf16 weights are saved as fp32 weights, 1 once fixed."""

import sys
from types import SimpleNamespace

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

main = torch.tensor([1.2345678, -0.0123456])
bits = main.view(torch.int32)
remainders = bits.to(torch.int16)  # the lower 16 bits
weight = torch.nn.Parameter(((bits - remainders.int()) >> 16).to(torch.int16).view(torch.bfloat16))


class FusedAdam:
    """Stores remainders as Transformer Engine's optimizer does with `store_param_remainders`, which Megatron sets."""

    store_param_remainders = True

    def __init__(self) -> None:
        self.param_groups = [{"params": [weight]}]
        self.state = {weight: {"master_param": remainders, "exp_avg": torch.zeros(2)}}

    def get_unscaled_state(self, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
        """Return int16 remainders as they are."""
        return self.state[parameter][name]


config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True, bf16=True)
optimizer = SimpleNamespace(optimizer=FusedAdam(), config=config, model_param_group_index_map={weight: (0, 0)})
saved = DistributedOptimizer._get_main_param_and_optimizer_states(optimizer, weight)["param"].float()
print(f"fp32 weights {main.tolist()} are saved as {saved.tolist()}")
sys.exit(0 if torch.equal(saved, remainders.float()) else 1)
