"""Pretraining that also records the input of its routers, from which a test computes the logged numbers again.

Whenever the routing is logged, each rank writes `routed{ITERATION}_{RANK}.pt` beside TensorBoard's folder. The file
holds for each layer the micro-batches since the last record, as pairs of ids int64 [tokens] and logits float64
[tokens, experts].
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
from collections import defaultdict
from pathlib import Path

import torch
from megatron.training import get_args

from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.trainer import main
from maskmoe.training.watch import routing_log
from maskmoe.transformer.router import MaskMoERouter

micro_batches = defaultdict(list)
route, take_record = MaskMoERouter.routing, routing_log.take_record


def record_and_route(router, logits, token_ids, attaches_losses=True):
    if router.training:
        ids = token_ids.ids.flatten()
        micro_batches[router.layer_number].append((ids, logits.detach().flatten(0, 1).double()))
    return route(router, logits, token_ids, attaches_losses)


def write_and_take_record(model):
    args = get_args()
    routers = [module for module in model[0].modules() if isinstance(module, MaskMoERouter)]
    routed = {router.layer_number: micro_batches[router.layer_number] for router in routers}
    name = f"routed{args.curr_iteration + 1}_{torch.distributed.get_rank()}.pt"
    torch.save(routed, Path(args.tensorboard_dir).parent / name)
    micro_batches.clear()
    return take_record(model)


if __name__ == "__main__":
    MaskMoERouter.routing = record_and_route
    routing_log.take_record = write_and_take_record
    run_tool(main)
