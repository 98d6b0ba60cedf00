"""Pretraining in which the batches of some iterations have a loss that is far too high, or far too low.

The environment variable SPIKES holds the iterations, counted from 1 and separated by commas. SPIKE_FACTOR is the factor
of their losses, and so of their gradients. In the iteration WITHOUT_UPDATE, the optimizer does nothing.
"""

import os

from maskmoe.megatron_compat import prepare_process

prepare_process()
from megatron.core.optimizer import ChainedOptimizer
from megatron.training import get_args

from maskmoe.processes.run_tool import run_tool
from maskmoe.training import trainer
from maskmoe.training.trainer import Trainer

SPIKES = {int(iteration) for iteration in os.environ["SPIKES"].split(",") if iteration}
FACTOR = float(os.environ["SPIKE_FACTOR"])
WITHOUT_UPDATE = int(os.environ["WITHOUT_UPDATE"])

stock_forward_step, stock_step = Trainer.forward_step, ChainedOptimizer.step


def forward_step(self, data_iterator, model):
    output, loss_function = stock_forward_step(self, data_iterator, model)
    is_loss = output.dim() == 2  # [batch, sequence]; the hidden states of other pipeline stages have three dimensions
    if is_loss and model.training and get_args().curr_iteration + 1 in SPIKES:
        output = output * FACTOR
    return output, loss_function


def step(optimizer):
    return (False, 1.0, None) if get_args().curr_iteration + 1 == WITHOUT_UPDATE else stock_step(optimizer)


if __name__ == "__main__":
    Trainer.forward_step = forward_step
    ChainedOptimizer.step = step
    run_tool(trainer.main)
