"""Patches of Megatron-Core and torch that concern checkpoints.

Each function replaces something of megatron-core 0.19.2 or torch 2.15 and says what, why, and when the patch can go.
"""

import multiprocessing.connection
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import wraps
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor, gpt_checkpoint_interop
from megatron.core.dist_checkpointing.exchange_utils import ShardDistribution, exchange_loaded_tensors_gather_object
from megatron.core.dist_checkpointing.strategies import filesystem_async, fully_parallel
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.training import checkpointing
from torch.distributed.checkpoint import default_planner, filesystem

from maskmoe.checkpoint.integrity import read_layout
from maskmoe.megatron_compat import replace, replacing
from maskmoe.processes.interruption import SIGNALS_THAT_SAVE
from maskmoe.processes.lifetimes import end_with_parent

_SHORT_INTEGERS = (torch.int16, torch.uint16)
_RANK_PROCESS = "MASKMOE_RANK_PROCESS"
rank_is_ending = threading.Event()
"""Is set when this rank ends, and ends its writer."""

_stock_get_process: Callable[..., BaseProcess] = PersistentAsyncCaller._get_process
_stock_async_loop: Callable[..., None] = PersistentAsyncCaller.async_loop


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


def tie_writers_to_their_rank() -> None:
    """Let the processes of asynchronous saving end with their rank, not earlier and not later.

    Replaces: `PersistentAsyncCaller._get_process` and `async_loop`, and `filesystem_async.get_write_results_queue`.
    Why: A signal that asks for a last checkpoint goes to the whole process group and would kill the writer before it
        has written the checkpoint. When the rank is killed, the writer would stay and might write into the folder that
        the rank's successor saves to. When the writer is killed, the rank would wait for the writer forever.
    Can go: When Megatron-Core blocks these signals in its writers, ends them with their rank, and notices their end.
    """
    replace(PersistentAsyncCaller, "_get_process", staticmethod(start_writer))
    replace(PersistentAsyncCaller, "async_loop", staticmethod(write_for_rank))
    replace(filesystem_async, "get_write_results_queue", get_write_results_queue)


def start_writer(*args: Any) -> BaseProcess:
    """Return the process that writes the checkpoints of this rank; start the process if there is none."""
    if PersistentAsyncCaller._persistent_process is not None:
        return PersistentAsyncCaller._persistent_process
    with _immune_children():
        writer = _stock_get_process(*args)
    threading.Thread(target=end_with_writer, args=(writer,), daemon=True).start()
    return writer


def end_with_writer(writer: BaseProcess) -> None:
    """Wait for the end of the process that writes checkpoints; unless this rank has ended it, end this rank, too."""
    multiprocessing.connection.wait([writer.sentinel])
    time.sleep(1)  # Megatron may be ending the writer: only one thread can read the exit code
    if writer.exitcode and not rank_is_ending.is_set():
        print(
            f"error: the process that writes checkpoints has died (host {socket.gethostname()}, process {writer.pid}, "
            f"exit code {writer.exitcode}); a killed process (-9) may mean that the host is out of memory. Start the "
            "run again: it resumes from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def write_for_rank(*args: Any) -> None:
    """Run `PersistentAsyncCaller.async_loop` in this process, which is killed when its rank ends.

    The parent is a fork server, which lives as long as it has a child, so watch the rank and not the parent.
    """
    threading.Thread(target=_end_with, args=(int(os.environ[_RANK_PROCESS]),), daemon=True).start()
    _stock_async_loop(*args)


def get_write_results_queue(mp_mode: str = "spawn") -> Queue:
    """Return the queue of write results; its process ends together with this process."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=torch.multiprocessing.get_context(mp_mode))
        with _immune_children():
            manager.start(end_with_parent, (os.getpid(),))
        # The queue keeps its manager alive. The attribute is declared as None.
        filesystem_async._results_queue = manager.Queue()  # pyrefly: ignore[bad-assignment]
    return filesystem_async._results_queue  # pyrefly: ignore[bad-return]


@contextmanager
def _immune_children() -> Iterator[None]:
    """Let processes that the block starts inherit blocked `SIGNALS_THAT_SAVE`, and this rank in their environment."""
    os.environ[_RANK_PROCESS] = str(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_THAT_SAVE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(process: int) -> None:
    """Kill this process when another process ends."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def load_either_implementation() -> None:
    """Load checkpoints of local modules into Transformer Engine's modules, and the other way round.

    Replaces: `_load_global_dist_base_checkpoint` in `megatron.training.checkpointing`.
    Why: In layers with experts, Megatron's local modules and Transformer Engine's save the norm before the experts
        under different names, and Transformer Engine's norms save a state of FP8, too. Megatron asks a checkpoint for
        the names of the model that is loaded, and has no hook between the request and the checkpoint.
    Can go: When Megatron's local modules save the same names as Transformer Engine's.
    """
    load_stock = checkpointing._load_global_dist_base_checkpoint

    @wraps(load_stock)
    def load(
        load_dir: str, args: Namespace, rank0: bool, state: dict | None, iteration: int, release: bool, **options: Any
    ) -> tuple:
        if state is not None and not rank0:
            # Processes that load no checkpoint need not spend the time to import these modules.
            from maskmoe.checkpoint.integrity import read_checkpoint_layout
            from maskmoe.checkpoint.saved_names import request_saved_names

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

    def find_gpt_model(args: Namespace, saved_args: Namespace, model: object) -> tuple:
        # Processes that load no checkpoint need not spend the time to import this module.
        from maskmoe.checkpoint.saved_names import find_equivalent_gpt

        return find_equivalent_gpt(args, saved_args, model)

    retarget_stock = gpt_checkpoint_interop.retarget_sharded_state_dict_to_gpt_checkpoint

    def retarget(state: dict[str, Any], gpt_model: Any) -> None:
        gpt_model.request_names_of_gpt_model(state, retarget_stock)

    replace(checkpointing, "_maybe_setup_gpt_to_hybrid_load", find_gpt_model)
    replace(gpt_checkpoint_interop, "retarget_sharded_state_dict_to_gpt_checkpoint", retarget)


def load_the_chosen_checkpoint() -> None:
    """Load a non-persistent checkpoint if, and only if, the run has chosen it.

    Replaces: `_get_non_persistent_iteration` in `megatron.training.checkpointing`.
    Why: Megatron loads the non-persistent checkpoint that the tracker file names, sound or not, unless the persistent
        one is newer. With `--ckpt-step` it still does so.
    Can go: When Megatron verifies checkpoints and takes the choice from its caller.
    """

    def get_iteration(
        non_persistent_global_dir: str, args: Namespace, checkpointing_context: dict | None = None
    ) -> int:
        return args.ckpt_step if getattr(args, "loads_non_persistent", False) else -1

    replace(checkpointing, "_get_non_persistent_iteration", get_iteration)


def exchange_short_integers() -> None:
    """Let `--ckpt-fully-parallel-load` load routing masks.

    Replaces: `exchange_by_distribution` in `megatron.core.dist_checkpointing.strategies.fully_parallel`.
    Why: Each rank loads a part of the tensors and sends it to the other ranks. NCCL and gloo cannot send integers of 16
        bits, of which a routing mask consists. The replacement sends them as objects; a mask has a few MiB.
    Can go: When Megatron sends tensors of all types.
    """
    exchange_stock = fully_parallel.exchange_by_distribution

    @wraps(exchange_stock)
    def exchange(
        loaded: Mapping[Any, torch.Tensor],
        unloaded: Mapping[Any, ShardedTensor],
        distribution: ShardDistribution,
        group: torch.distributed.ProcessGroup | None = None,
        exchange_algo: str = "broadcast",
    ) -> dict[Any, torch.Tensor]:
        short = {id for id, shard in distribution.shard_to_metadata.items() if shard.dtype in _SHORT_INTEGERS}
        of_others = {id: rank for id, rank in distribution.main_rank_for_shard.items() if id not in short}
        others = exchange_stock(
            {id: tensor for id, tensor in loaded.items() if id not in short},
            {id: shard for id, shard in unloaded.items() if id not in short},
            distribution._replace(main_rank_for_shard=of_others),
            group,
            exchange_algo,
        )
        own = {id: tensor.cpu() for id, tensor in loaded.items() if id in short}
        return others | exchange_loaded_tensors_gather_object(own, {}, distribution, group)

    replace(fully_parallel, "exchange_by_distribution", exchange)


EVERY_PROCESS = (
    *(unpickle_data_only, tie_writers_to_their_rank, load_either_implementation),
    *(load_gpt_checkpoints_into_hybrid_models, load_the_chosen_checkpoint, exchange_short_integers),
)
"""The patches that `prepare_process` applies."""


def keep_checkpoints_whole(save: Callable[..., None], finalize: Callable[..., None]) -> None:
    """Save into empty folders only, record a digest of every file, and record every save; for processes that train.

    Replaces: `TorchDistSaveShardedStrategy` and `cleanup_old_non_persistent_checkpoint` in
        `megatron.training.checkpointing`, and `save_checkpoint` and `maybe_finalize_async_save` in
        `megatron.training.training`.
    Why: Megatron saves over the files of an interrupted save and, if asked for a record of its files, makes the record
        on one rank. It hard-codes the class that writes and the functions that save, so replace these names. Before it
        saves a non-persistent checkpoint, Megatron keeps the newest one even if it is not finished, removes the sound
        one, and looks for checkpoints in all subfolders. `CheckpointSaver` has removed the right ones before.
    Can go: When Megatron takes the strategy and the functions as arguments, and keeps sound checkpoints.

    Args:
        save: `CheckpointSaver.save`.
        finalize: `CheckpointSaver.finalize`.
    """
    # Processes that do not train need not spend the time to import these modules.
    from megatron.training import training

    from maskmoe.checkpoint.saver import SealedSaveStrategy

    replace(checkpointing, "TorchDistSaveShardedStrategy", SealedSaveStrategy)
    replace(checkpointing, "cleanup_old_non_persistent_checkpoint", lambda *args, **kwargs: None)
    replace(training, "save_checkpoint", save)
    replace(training, "maybe_finalize_async_save", finalize)


def saving_into(folder: Path) -> AbstractContextManager:
    """Let Megatron save a checkpoint into another folder than that of its iteration.

    Replaces: `get_checkpoint_name` in `megatron.training.checkpointing`, inside a `with` block only.
    Why: Megatron saves an iteration again if the next step is NaN, over the files of its checkpoint.
    Can go: When Megatron keeps a checkpoint until it is saved again.
    """
    return replacing(checkpointing, get_checkpoint_name=lambda *_, **__: str(folder))


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
