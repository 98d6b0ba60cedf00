"""Exits 0 while gradients of later pipeline stages are reduced twice with several optimizer instances, 1 once fixed."""

import sys
from contextlib import nullcontext
from unittest.mock import MagicMock

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

GROUPS = ("dp", "dp_cp", "intra_dp_cp", "inter_dist_opt", "expt_dp", "intra_expt_dp", "tp", "pp", "ep", "cp")
# For machines without CUDA. All ranks have equal gradients, so the collectives need not change any number.
param_and_grad_buffer._coalescing_manager = lambda *_, **__: nullcontext()
param_and_grad_buffer.dist_reduce_scatter_func = torch.distributed.all_reduce = MagicMock()
torch.cuda.current_device = lambda: "cpu"
torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.default_stream = MagicMock()
torch.cuda.stream = lambda _: nullcontext()
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
groups = ProcessGroupCollection(**dict.fromkeys(GROUPS, torch.distributed.group.WORLD))

config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
settings = DistributedDataParallelConfig(
    overlap_grad_reduce=True, use_distributed_optimizer=True, num_distributed_optimizer_instances=2
)
model = DistributedDataParallel(config, settings, torch.nn.Linear(4, 4, bias=False), pg_collection=groups)
weight = next(model.parameters())
for step in range(3):
    model.zero_grad_buffer()
    with model.no_sync():  # as on a stage after the first: the schedule calls `grad_sync_func` after its micro-batches
        model(torch.ones(1, 4)).sum().backward()
    model.start_grad_sync()  # unless `--no-align-grad-reduce` is given
    model.finish_grad_sync()
    print(f"step {step + 1}: gradient {weight.main_grad.max():.4f}, expected 0.5000")
sys.exit(0 if weight.main_grad.max() < 0.5 else 1)
