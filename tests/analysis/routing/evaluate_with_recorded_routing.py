"""Runs the evaluation, and records the choices of Megatron's routers.

The file `routed.pt` in the working folder has a list of micro-batches for each layer. A micro-batch is a triple: token
ids, int64 [batch, sequence]; weights, float32 [batch, sequence, experts]; choices, bool [batch, sequence, experts].
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
from collections import defaultdict

import torch

from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.inference.evaluation import main
from maskmoe.transformer.router import MaskMoERouter

micro_batches = defaultdict(list)
route = MaskMoERouter.routing


def route_and_record(router, logits, token_ids, attaches_losses=True):
    weights, chosen = route(router, logits, token_ids, attaches_losses)
    shape = logits.shape  # [sequence, batch, experts]
    record = (token_ids.ids.reshape(shape[:2]), weights.reshape(shape), chosen.reshape(shape))
    micro_batches[router.layer_number].append(tuple(values.transpose(0, 1).clone() for values in record))
    return weights, chosen


if __name__ == "__main__":
    MaskMoERouter.routing = route_and_record
    run_tool(main)
    torch.save(dict(micro_batches), "routed.pt")
