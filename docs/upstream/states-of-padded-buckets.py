"""Exits 0 while optimizer states behind a padded bucket are saved from wrong places, 1 once fixed."""

import sys
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

GROUPS = ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp", "tp", "pp", "ep", "cp")
torch.cuda.current_device = lambda: "cpu"  # for machines without CUDA
torch.Tensor.type = lambda self: "torch.cuda.FloatTensor"
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
group = torch.distributed.group.WORLD
config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
# Each layer has a bucket of 4 numbers, padded to 128.
settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=1)
layers = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(4, 1, bias=False))
groups = ProcessGroupCollection(**dict.fromkeys(GROUPS, group))
model = DistributedDataParallel(config, settings, layers, pg_collection=groups)
for number, weight in enumerate(layers.parameters()):
    weight.data.fill_(number + 1.0)
parameters = {"params": [*layers.parameters()], "wd_mult": 1.0, "lr_mult": 1.0}
adam = torch.optim.AdamW([parameters | {"is_expert_parallel": False, "is_decoupled_lr": False}], lr=0.0)
options = OptimizerConfig(optimizer="adam", lr=0.0, use_distributed_optimizer=True)
tensor = torch.tensor
with patch.object(torch, "tensor", lambda *values, device, **settings: tensor(*values, **settings)):  # on a CPU
    optimizer = DistributedOptimizer(adam, options, None, None, [model], {0: model.buffers}, group, group, 0, 0)
for shard in adam.param_groups[0]["params"]:
    shard.grad = torch.zeros_like(shard)
adam.step()  # makes the state

request = {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in layers.named_parameters()}
metadata = {"distrib_optim_fully_reshardable_mem_efficient": True}
saved = optimizer.sharded_param_state_fully_reshardable(request, metadata=metadata)
weights = {state["param"].key: state["param"].data.tolist() for state in saved.values()}
print(f"saved: {weights}")
sys.exit(0 if weights["optimizer.state.param.0.weight"] != [[1.0] * 4] else 1)
