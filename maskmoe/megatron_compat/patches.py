"""The one place where functions of Megatron-Core and torch are replaced, on CPU and GPU alike.

Written for megatron-core 0.19.2 and torch 2.15; each entry says what goes wrong without it.
"""

import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import torch


def apply() -> None:
    """Replace what every entry point needs; call before `megatron.training.pretrain`."""
    _use_helpers_of_the_wheel()
    _make_optimizer_state_loadable()
    _unpickle_data_only()
    _tie_writers_to_their_rank()


@contextmanager
def latent_projections_without_transformer_engine(linear: Callable[..., torch.nn.Module]) -> Iterator[None]:
    """`MoELayer` makes its latent projections of Transformer Engine alone: without it they could not even be counted.

    Args:
        linear: makes a projection, called as `TELinear` is.
    """
    from megatron.core.transformer.moe import moe_layer

    stock = moe_layer.HAVE_TE, moe_layer.TELinear
    if not moe_layer.HAVE_TE:
        moe_layer.HAVE_TE, moe_layer.TELinear = True, linear
    try:
        yield
    finally:
        moe_layer.HAVE_TE, moe_layer.TELinear = stock


def _use_helpers_of_the_wheel() -> None:
    """`initialize_megatron` runs `make` in its own folder, but the wheel has no Makefile there: every run would end.

    The wheel ships the module that `make` would build.
    """
    from megatron.core.datasets import helpers_cpp, utils

    assert helpers_cpp is not None
    utils.compile_helpers = lambda: None


def _make_optimizer_state_loadable() -> None:
    """Without Apex and Transformer Engine, `DistributedOptimizer` cannot load what it saved, for four reasons.

    - `state_dict` wants the step that all parameters share, and there is none before the first step, which is when a
      checkpoint is loaded. So allocate the state first, as Adam itself would at its first step.
    - `load_state_dict` copies into views of fp32 parameters, which autograd forbids.
    - It gives all parameters one and the same `step` tensor, so that every parameter's update advances it for all.
    - It then overwrites the step with that of the state that was allocated for loading, or misses it.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    stock_state_dict = distrib_optimizer.DistributedOptimizer.state_dict
    stock_load_state_dict = distrib_optimizer.DistributedOptimizer.load_state_dict
    stock_set_states = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self):
        inner = self.optimizer
        if not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                inner.state[parameter]["step"] = torch.tensor(0.0)
                for key in self.optimizer_state_keys:
                    inner.state[parameter][key] = torch.zeros_like(parameter)
        return stock_state_dict(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        stock_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_states(self, model_param, tensors):
        # What is no tensor is left as it is.
        stock_set_states(self, model_param, tensors | {"step": None})

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    distrib_optimizer.DistributedOptimizer.state_dict = state_dict
    distrib_optimizer.DistributedOptimizer.load_state_dict = load_state_dict


def _unpickle_data_only() -> None:
    """torch unpickles the layout and the objects of a checkpoint without restraint: a crafted one can run any code."""
    from torch.distributed.checkpoint import default_planner, filesystem

    from maskmoe.checkpoint.unpickling import read_layout, read_object

    def load_bytes(self, read_item, value):
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], read_object(value))
        else:
            self.state_dict[name] = read_object(value)

    filesystem.pickle = SimpleNamespace(load=read_layout, dump=pickle.dump)
    default_planner.DefaultLoadPlanner.load_bytes = load_bytes


def keep_checkpoints_whole(while_saving: Callable[[], AbstractContextManager]) -> None:
    """Megatron saves over the rests of an interrupted save, and records what it wrote on one rank, if asked to.

    It chooses the class that writes and the function that saves by name and cannot be told of others.

    Args:
        while_saving: entered around each save.
    """
    from megatron.training import checkpointing, training

    from maskmoe.checkpoint.saving import SealedSaveStrategy, saving_whole_checkpoints

    checkpointing.TorchDistSaveShardedStrategy = SealedSaveStrategy
    training.save_checkpoint = saving_whole_checkpoints(training.save_checkpoint, while_saving)


def _tie_writers_to_their_rank() -> None:
    """Of the processes of asynchronous saving, signals that ask for a last checkpoint end one too early.

    When the rank is killed, they stay, and one may go on writing into what the rank's successor saves.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from maskmoe.checkpoint.writer_process import get_write_results_queue, immune_children, write_for_rank

    stock_get_process = PersistentAsyncCaller._get_process

    @classmethod
    @functools.wraps(stock_get_process.__func__)
    def get_process(cls, *args, **kwargs):
        with immune_children():
            return stock_get_process(*args, **kwargs)

    PersistentAsyncCaller._get_process = get_process
    PersistentAsyncCaller.async_loop = staticmethod(write_for_rank)
    filesystem_async.get_write_results_queue = get_write_results_queue
