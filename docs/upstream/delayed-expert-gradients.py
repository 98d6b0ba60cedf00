"""Exits 0 while gradients of experts that are computed late are reduced at their usual place, 1 once fixed."""

import sys
from unittest.mock import MagicMock

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

GROUPS = ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp", "tp", "pp", "ep", "cp")
torch.cuda.current_device = lambda: "cpu"  # for machines without CUDA
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
groups = ProcessGroupCollection(**dict.fromkeys(GROUPS, torch.distributed.group.WORLD))

# Transformer Engine's grouped linear layer with `delay_wgrad_compute=True`, which
# `--overlap-dispatch-backward-with-experts-wgrad` sets, marks its weights so and has such a method.
experts = torch.nn.Linear(4, 4, bias=False)
experts.weight.skip_backward_post_hook = True
experts.register_wgrad_accumulation_and_reduce_hooks = MagicMock()
# `get_megatron_ddp_config` sets `delay_wgrad_compute` from `--delay-wgrad-compute` alone.
settings = DistributedDataParallelConfig(overlap_grad_reduce=True, delay_wgrad_compute=False)
config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
DistributedDataParallel(config, settings, experts, pg_collection=groups)
is_called_late = experts.register_wgrad_accumulation_and_reduce_hooks.called
print(f"the reduction waits for the gradients of the experts: {is_called_late}")
sys.exit(0 if not is_called_late else 1)
