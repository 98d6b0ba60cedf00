"""Pretraining in which the routing of one layer collapses for some iterations.

COLLAPSE names the fault: `rank` keeps all tokens from experts 0 to 3, and `entropy` gives all other experts than the
best one the probability 0. The fault is in the MoE layer COLLAPSE_LAYER, counted from 0, from
iteration COLLAPSE_FROM until before COLLAPSE_UNTIL.
"""

import os

from maskmoe.megatron_compat import prepare_process

prepare_process()
from megatron.training import get_args

from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.trainer import main
from maskmoe.transformer.router import MaskMoERouter

KIND = os.environ["COLLAPSE"]
LAYER = int(os.environ["COLLAPSE_LAYER"])
ITERATIONS = range(int(os.environ["COLLAPSE_FROM"]), int(os.environ["COLLAPSE_UNTIL"]))

stock_routing = MaskMoERouter.routing


def route(router, logits, token_ids, attaches_losses=True):
    if router.number_in_model - 1 == LAYER and router.training and get_args().curr_iteration + 1 in ITERATIONS:
        logits = logits.clone()
        if KIND == "rank":
            logits[..., :4] -= 1000
        else:
            logits = logits * 1e6
    return stock_routing(router, logits, token_ids, attaches_losses)


if __name__ == "__main__":
    MaskMoERouter.routing = route
    run_tool(main)
