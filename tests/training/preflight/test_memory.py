"""The memory of a run's optimizer, against the state of a real optimizer."""

from argparse import Namespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from support import small_moe as moe
from torch.utils._pytree import tree_leaves

from maskmoe.training.preflight.memory import bytes_of_parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizer_has_the_bytes_of_its_state(one_rank: None, dtype: torch.dtype) -> None:
    """Adam keeps two moments of each parameter, and a main copy of each bf16 parameter."""
    is_bf16 = dtype == torch.bfloat16
    config = moe.make_config(4, params_dtype=dtype, bf16=is_bf16)
    model = moe.make_model(config, moe.make_mask(moe.random_visible_sets(0, 1, 9, 4)))
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(), Float16Module(config, model) if is_bf16 else model
    )
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=is_bf16, params_dtype=dtype)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    wrapped.zero_grad_buffer()
    optimizer.step()
    tensors = [leaf for leaf in tree_leaves(optimizer.state_dict()) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    args = Namespace(
        params_dtype=dtype,
        optimizer="adam",
        use_precision_aware_optimizer=False,
        accumulate_allreduce_grads_in_fp32=True,
    )
    _, _, of_optimizer = bytes_of_parameter(args)
    assert of_optimizer * sum(parameter.numel() for parameter in model.parameters()) == sum(t.nbytes for t in tensors)
