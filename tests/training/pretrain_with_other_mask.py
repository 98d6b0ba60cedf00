"""Pretraining that replaces the mask of the loaded model by `wider.safetensors`, without `--change-routing-mask`.

The model is built with the checkpoint's mask and loads the checkpoint as any run. Then the tables that the router reads
are replaced. So the run has the checkpoint's weights, optimizer states and data, and the other mask.
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.training import training

from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.trainer import main
from maskmoe.transformer.visible_experts import VisibleExperts

setup_model_and_optimizer = training.setup_model_and_optimizer


def setup_and_replace_mask(*args, **kwargs):
    model, *others = setup_model_and_optimizer(*args, **kwargs)
    mask = RoutingMask.load("wider.safetensors")
    (visible_experts,) = (module for module in model[0].modules() if isinstance(module, VisibleExperts))
    assert visible_experts.min_visible == mask.min_visible
    visible_experts.row_of_id = torch.from_numpy(mask.row_of_id.copy())
    visible_experts.visible_bits = torch.from_numpy(mask.visible_bits.copy())
    return model, *others


if __name__ == "__main__":
    training.setup_model_and_optimizer = setup_and_replace_mask
    run_tool(main)
