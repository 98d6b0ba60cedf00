"""Pretraining with a fault of the kind FAULT on the rank FAULT_RANK, in the iteration FAULT_ITERATION.

The environment variable FAULT is one of:
- `hang`: the rank sleeps before the iteration.
- `nan`: the rank's gradients become NaN in the iteration, once. The file `fault-happened` in FAULT_FOLDER records this.
- `nan-always`: the rank's gradients become NaN in the iteration, also if Megatron repeats the step.
- `nan-reduced`: as `nan-always`, but only in the reduced gradients, because Megatron's check before it sees nothing.
- `slow-save`: the rank writes checkpoints slowly.
- `slow-start`: the rank prints a line and then never begins to train.
- `none`: nothing goes wrong.
"""

import functools
import os
import time
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.training import get_args

from maskmoe.processes.run_tool import run_tool
from maskmoe.training import trainer
from maskmoe.training.trainer import Trainer

KIND = os.environ["FAULT"]
RANK = int(os.environ["FAULT_RANK"])
ITERATION = int(os.environ["FAULT_ITERATION"])
DONE = Path(os.environ["FAULT_FOLDER"]) / "fault-happened"


def is_due() -> bool:
    return int(os.environ.get("RANK", "0")) == RANK and get_args().curr_iteration == ITERATION - 1


stock_forward_step = Trainer.forward_step


def forward_step(self, data_iterator, model):
    if KIND == "hang" and is_due():
        time.sleep(1000)
    output, loss_function = stock_forward_step(self, data_iterator, model)
    if is_due() and (KIND in ("nan-always", "nan-reduced") or (KIND == "nan" and not DONE.exists())):
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
    # Outside of the main program, because the process of asynchronous saving imports this module and writes.
    filesystem_async._write_item = write_slowly


def build_datasets_forever(*args, **kwargs):
    if os.environ["RANK"] == str(RANK):
        print("starts slowly", flush=True)
        time.sleep(1000)


build_datasets_forever.is_distributed = True

if __name__ == "__main__":
    Trainer.forward_step = forward_step
    if KIND == "nan-reduced":
        _ParamAndGradBucketGroup.check_grads = lambda *_, **__: None
    if KIND == "slow-start":
        trainer.build_datasets = build_datasets_forever
    run_tool(trainer.main)
