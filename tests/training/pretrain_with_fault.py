"""Pretraining in which something goes wrong, as the environment says: FAULT=KIND, FAULT_RANK, FAULT_ITERATION.

hang: the rank sleeps before that iteration. nan: its gradients become NaN in that iteration, once: a file
`fault-happened` in FAULT_FOLDER says that it was so. nan-always: each time. slow-save: the rank is slow in writing
checkpoints. slow-start: it never gets ready, and says so.
"""

import functools
import os
import time
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import get_args

from maskmoe.cli import run_tool
from maskmoe.training import pretraining

KIND = os.environ["FAULT"]
RANK = int(os.environ["FAULT_RANK"])
ITERATION = int(os.environ["FAULT_ITERATION"])
DONE = Path(os.environ["FAULT_FOLDER"]) / "fault-happened"


def is_due() -> bool:
    return int(os.environ.get("RANK", "0")) == RANK and get_args().curr_iteration == ITERATION - 1


class FaultyStep(pretraining.MicroBatchStep):
    def forward(self, data_iterator, model):
        if KIND == "hang" and is_due():
            time.sleep(1000)
        output, loss_function = super().forward(data_iterator, model)
        if is_due() and (KIND == "nan-always" or (KIND == "nan" and not DONE.exists())):
            DONE.touch()
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output, loss_function


stock_write_item = filesystem_async._write_item


@functools.wraps(stock_write_item)
def write_slowly(*args, **kwargs):
    if os.environ.get("RANK", "0") == str(RANK):
        time.sleep(0.02)
    return stock_write_item(*args, **kwargs)


if KIND == "slow-save":
    # Not in the main program only: asynchronous saving writes in a process that imports this module.
    filesystem_async._write_item = write_slowly


def build_datasets_forever(*args, **kwargs):
    if os.environ["RANK"] == str(RANK):
        print("starts slowly", flush=True)
        time.sleep(1000)


build_datasets_forever.is_distributed = True

if __name__ == "__main__":
    pretraining.MicroBatchStep = FaultyStep
    if KIND == "slow-start":
        pretraining.train_valid_test_datasets_provider = build_datasets_forever
    run_tool(pretraining.main)
