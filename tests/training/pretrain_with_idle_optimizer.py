"""Pretraining in which the optimizer does nothing in the iteration WITHOUT_UPDATE, counted from 1."""

import os

from maskmoe.megatron_compat import prepare_process

prepare_process()
from megatron.core.optimizer import ChainedOptimizer
from megatron.training import get_args

from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.trainer import main

ITERATION = int(os.environ["WITHOUT_UPDATE"])

stock_step = ChainedOptimizer.step


def step(optimizer):
    return (False, 1.0, None) if get_args().curr_iteration + 1 == ITERATION else stock_step(optimizer)


if __name__ == "__main__":
    ChainedOptimizer.step = step
    run_tool(main)
