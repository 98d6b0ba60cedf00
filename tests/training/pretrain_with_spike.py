"""Pretraining in which the batches of some iterations have a loss that is far too high.

The environment variable SPIKES holds the iterations, counted from 1 and separated by commas.
"""

import os

from maskmoe.megatron_compat import prepare_process

prepare_process()
from megatron.training import get_args

from maskmoe.processes.run_tool import run_tool
from maskmoe.training import trainer
from maskmoe.training.trainer import Trainer

SPIKES = {int(iteration) for iteration in os.environ["SPIKES"].split(",") if iteration}
FACTOR = 50

stock_forward_step = Trainer.forward_step


def forward_step(self, data_iterator, model):
    output, loss_function = stock_forward_step(self, data_iterator, model)
    is_loss = output.dim() == 2  # [batch, sequence]; the hidden states of other pipeline stages have three dimensions
    if is_loss and model.training and get_args().curr_iteration + 1 in SPIKES:
        output = output * FACTOR
    return output, loss_function


if __name__ == "__main__":
    Trainer.forward_step = forward_step
    run_tool(trainer.main)
