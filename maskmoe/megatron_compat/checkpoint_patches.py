"""Patches of Megatron-Core and torch that concern checkpoints.

Each function replaces something of megatron-core 0.19.2 or torch 2.15 and says what, why, and when the patch can go.
"""

import pickle
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import gpt_checkpoint_interop
from megatron.training import checkpointing, training
from torch.distributed.checkpoint import default_planner, filesystem

from maskmoe.checkpoint.reading import read_checkpoint_layout, read_layout
from maskmoe.checkpoint.saved_names import find_gpt_twin, request_names_of_gpt_model, request_saved_names
from maskmoe.checkpoint.saver import SealedSaveStrategy
from maskmoe.checkpoint.series import temporary_load_folder
from maskmoe.megatron_compat import replace


def unpickle_data_only() -> None:
    """Refuse pickles with code in checkpoints.

    Replaces: `pickle` in `torch.distributed.checkpoint.filesystem`, and `DefaultLoadPlanner.load_bytes`.
    Why: torch unpickles the layout and the objects of a checkpoint without restrictions, so a crafted checkpoint can
        run any code.
    Can go: When torch reads both with restrictions.
    """

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        name = read_item.dest_index.fqn
        # Megatron-Core registers the classes of its settings with torch when it is imported.
        try:
            content = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's message advises to run the code
            raise pickle.UnpicklingError(f"{name} is damaged, or names code that would run") from error
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content

    replace(filesystem, "pickle", SimpleNamespace(load=read_layout, dump=pickle.dump))
    replace(default_planner.DefaultLoadPlanner, "load_bytes", load_bytes)


def load_either_implementation() -> None:
    """Ask checkpoints for the names that they have, and for tensors that ranks can send each other.

    Replaces: `_load_global_dist_base_checkpoint` in `megatron.training.checkpointing`.
    Why: In layers with experts, Megatron's local modules and Transformer Engine's save the norm before the experts
        under different names, and Transformer Engine's norms save a state of FP8, too. Megatron asks a checkpoint for
        the names of the model that is loaded, and has no hook between the request and the checkpoint. With
        `--ckpt-fully-parallel-load`, each rank loads a part of the tensors and sends it to the other ranks, but NCCL
        and gloo cannot send integers of 16 bits, of which a routing mask consists.
    Can go: When Megatron's local modules save the same names as Transformer Engine's, and Megatron sends tensors of all
        types.
    """
    load_stock = checkpointing._load_global_dist_base_checkpoint

    @wraps(load_stock)
    def load(
        load_dir: str, args: Namespace, rank0: bool, state: dict | None, iteration: int, release: bool, **options: Any
    ) -> tuple:
        if state is not None and not rank0:
            folder = checkpointing.get_checkpoint_name(load_dir, iteration, release, return_base_dir=True)
            request_saved_names(state, read_checkpoint_layout(Path(folder)).state_dict_metadata.keys())
        return load_stock(load_dir, args, rank0, state, iteration, release, **options)

    replace(checkpointing, "_load_global_dist_base_checkpoint", load)


def load_gpt_checkpoints_into_hybrid_models() -> None:
    """Load every checkpoint of a GPT model into a hybrid model with its layers.

    Replaces: `_maybe_setup_gpt_to_hybrid_load` in `megatron.training.checkpointing`, and
        `retarget_sharded_state_dict_to_gpt_checkpoint` in `megatron.core.dist_checkpointing.gpt_checkpoint_interop`.
    Why: Megatron loads such a checkpoint only if the layers are all dense or all have experts, without latent
        attention, without GDN and without multi-token prediction.
    Can go: When `gpt_compatible_layer_maps` accepts these patterns.
    """
    replace(checkpointing, "_maybe_setup_gpt_to_hybrid_load", find_gpt_twin)
    replace(gpt_checkpoint_interop, "retarget_sharded_state_dict_to_gpt_checkpoint", request_names_of_gpt_model)


EVERY_PROCESS = (unpickle_data_only, load_either_implementation, load_gpt_checkpoints_into_hybrid_models)
"""The patches that `prepare_process` applies."""


def load_only(checkpoint: Path | None, args: Namespace) -> None:
    """Let Megatron load the checkpoint that was chosen, or none; for processes that build a model.

    Replaces: `load_checkpoint` in `megatron.training.training`.
    Why: Megatron chooses the checkpoint itself, intact or not, see `temporary_load_folder`.
    Can go: When Megatron takes the folder of a checkpoint.
    """
    stock = training.load_checkpoint

    @wraps(stock)
    def load(*arguments: Any, **options: Any) -> tuple:
        with temporary_load_folder(checkpoint, args):
            return stock(*arguments, **options)

    replace(training, "load_checkpoint", load)


def keep_checkpoints_whole(save: Callable[..., None], finalize: Callable[..., None]) -> None:
    """Save into empty folders only, record a digest of every file, and record every save; for processes that train.

    Replaces: `TorchDistSaveShardedStrategy` in `megatron.training.checkpointing`, and `save_checkpoint` and
        `maybe_finalize_async_save` in `megatron.training.training`.
    Why: Megatron saves over the files of an interrupted save and, if asked for a record of its files, makes the record
        on one rank. It hard-codes the class that writes and the functions that save, so replace these names.
    Can go: When Megatron takes the strategy and the functions as arguments.

    Args:
        save: `CheckpointSaver.save`.
        finalize: `CheckpointSaver.finalize`.
    """
    replace(checkpointing, "TorchDistSaveShardedStrategy", SealedSaveStrategy)
    replace(training, "save_checkpoint", save)
    replace(training, "maybe_finalize_async_save", finalize)


STATES_OF_CALLBACKS = "callbacks"
"""The entry of a checkpoint's common state with the states of callbacks, by the names of their classes."""


def save_states_of_callbacks(collect: Callable[[], dict[str, Any]]) -> None:
    """Save the states of the callbacks of a run with each checkpoint; for processes that train.

    Replaces: `generate_state_dict` in `megatron.training.checkpointing`.
    Why: Megatron saves what it knows only, and its save function takes no further state.
    Can go: When `save_checkpoint` takes further entries of the checkpoint.

    Args:
        collect: Returns the states, equal on all ranks; called by all ranks.
    """
    stock = checkpointing.generate_state_dict

    @wraps(stock)
    def generate(*args: Any, iteration: int | None = None, **options: Any) -> dict[str, Any]:
        state = stock(*args, iteration=iteration, **options)
        # Loading calls the function, too, but without an iteration.
        if iteration is not None and (states := collect()):
            state[STATES_OF_CALLBACKS] = states
        return state

    replace(checkpointing, "generate_state_dict", generate)


def override_learning_rates() -> None:
    """Load an optimizer's state into a run with another `--lr` or `--min-lr`; for runs with one learning rate.

    Replaces: `param_group_identifier_keys` in `megatron.core.optimizer.optimizer` and in
        `megatron.core.optimizer.distrib_optimizer`, and `OptimizerParamScheduler.load_state_dict`.
    Why: Megatron finds the saved parameter groups by their learning rates, among others. With
        `--override-opt-param-scheduler` and another learning rate, no group is found, and every rank fails. A loaded
        group also brings the learning rates of the checkpoint, which the scheduler prefers to its own.
    Can go: When Megatron resumes with `--override-opt-param-scheduler` and another `--lr`.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    keys = tuple(key for key in optimizer.param_group_identifier_keys if key not in ("max_lr", "min_lr"))
    for module in (optimizer, distrib_optimizer):
        replace(module, "param_group_identifier_keys", keys)
    load_stock = OptimizerParamScheduler.load_state_dict

    def load_state_dict(self: OptimizerParamScheduler, state_dict: dict[str, Any]) -> None:
        for group in self.optimizer.param_groups:
            group.update(max_lr=self.max_lr, min_lr=self.min_lr)
        load_stock(self, state_dict)

    replace(OptimizerParamScheduler, "load_state_dict", load_state_dict)
