"""Pretraining with Megatron-Core's own MoE layers, routers and, if the mask has hash layers, hash layers.

Its checkpoints hold no routing mask. Attention, norms, experts and the loss are as in all other runs.
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import get_args

from maskmoe.processes.run_tool import run_tool
from maskmoe.training.model import model_builder
from maskmoe.training.trainer import main
from maskmoe.transformer.layer_specs import map_spec
from maskmoe.transformer.models import DenseHybridModel
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.visible_experts import VisibleExperts


class MegatronsOwnModel(DenseHybridModel):
    def __init__(self, config: Any, *, visible_experts: VisibleExperts, **kwargs: Any) -> None:
        tables = [visible_experts.mask_table(table) for table in range(len(visible_experts.row_of_id))]
        ids = torch.arange(visible_experts.vocab_size)
        visible = [table.look_up(ids).experts.numpy() for table in tables]
        hashed = [sets for sets in visible if not sets.all()]
        if hashed:
            config.moe_n_hash_layers, config.actual_vocab_size = 2 * len(hashed), len(ids)  # symbols of the pattern
        super().__init__(config, **kwargs)
        routers = [module for module in self.modules() if isinstance(module, TopKRouter)]
        for router, sets in zip(routers, hashed, strict=False):
            assert router.is_hash_layer
            table = torch.from_numpy(np.nonzero(sets)[1].reshape(len(ids), -1)).int()
            # A checkpoint of MaskMoE holds no such tables, so do not ask for them.
            router.register_buffer("tid2eid", table, persistent=get_args().load is None)


def to_megatrons(node: Any) -> Any:
    if isinstance(node, MoESubmodules):
        return replace(node, router=TopKRouter)
    return MoELayer if node is MaskMoELayer else node


class MegatronsBuilder(model_builder.MaskMoEHybridModelBuilder):
    _classes = (DenseHybridModel, MegatronsOwnModel)

    def layer_specs(self, *args: Any) -> dict[str, Any]:
        return {name: map_spec(spec, to_megatrons) for name, spec in super().layer_specs(*args).items()}


if __name__ == "__main__":
    model_builder.MaskMoEHybridModelBuilder = MegatronsBuilder
    run_tool(main)
