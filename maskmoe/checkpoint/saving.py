"""Saving so that what is in the folder is whole: sealed by a manifest, cleared of rests, and no more than asked for."""

import functools
import queue
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.training import get_args, print_rank_0
from megatron.training.checkpointing import get_loaded_iteration
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint.integrity import Damage, Unfinished, check_structure, record_rank, write_manifest
from maskmoe.checkpoint.series import checkpoint_path, read_tracker, remove_old_checkpoints, saved_iterations


class SealedSaveStrategy(TorchDistSaveShardedStrategy):
    """`TorchDistSaveShardedStrategy` that records every file's digest where it is written.

    Each rank reads back its own files, from the page cache, in the process that wrote them. So asynchronous saving
    stays asynchronous, and no rank reads what others wrote.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        """As the method it overrides, without the process through which a writer elsewhere would report.

        It takes seconds to start, and a signal to the process group may end it.
        """
        elsewhere = filesystem_async._results_queue
        filesystem_async._results_queue = queue.Queue()
        try:
            self._sealed_request(sharded_state_dict, checkpoint_dir, "mcore").execute_sync()
        finally:
            filesystem_async._results_queue = elsewhere

    def async_save(self, sharded_state_dict: dict, checkpoint_dir: str | Path, async_strategy: str = "nvrx"):
        """As the method it overrides; what is in host memory is copied, as what is on a GPU is anyway.

        Otherwise it would be shared with the process that writes, while training goes on to change it.
        """
        request = self._sealed_request(sharded_state_dict, checkpoint_dir, async_strategy)
        if request.async_fn is not None:
            _, write_buckets, _ = request.async_fn_args
            # In place: the function that moves tensors to the host has the same list.
            write_buckets[:] = [_copy_host_tensors(bucket) for bucket in write_buckets]
        return request

    def _sealed_request(self, sharded_state_dict: dict, checkpoint_dir: str | Path, async_strategy: str):
        request = super().async_save(sharded_state_dict, checkpoint_dir, async_strategy)
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write_and_record, request.async_fn))
        request.finalize_fns.append(partial(_seal, Path(checkpoint_dir)))
        return request


def _copy_host_tensors(bucket: tuple) -> tuple:
    """A `WriteBucket` of Megatron-Core with copies of its tensors in host memory."""
    path, storage_key, (bytes_data, tensor_data) = bucket
    copied = [(item, tensor.clone() if tensor.device.type == "cpu" else tensor) for item, tensor in tensor_data]
    return path, storage_key, (bytes_data, copied)


def saving_whole_checkpoints(
    save_checkpoint: Callable[..., None], while_saving: Callable[[], AbstractContextManager]
) -> Callable[..., None]:
    """Make Megatron's `save_checkpoint` never write into a folder that holds something, and remove old checkpoints.

    Args:
        save_checkpoint: Megatron's.
        while_saving: entered around each save.
    """

    @functools.wraps(save_checkpoint)
    def save(iteration: int, *args: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> None:
        settings = get_args()
        if _is_saved(settings, iteration):
            print_rank_0(f"the checkpoint of iteration {iteration} is in {settings.save} already")
            return
        is_first = torch.distributed.get_rank() == 0
        remove_old = partial(
            remove_old_checkpoints, settings.save, settings.keep_last_checkpoints, settings.save_retain_interval
        )
        with while_saving():
            if is_first and not non_persistent_ckpt:
                shutil.rmtree(checkpoint_path(settings.save, iteration), ignore_errors=True)
                remove_old()
            torch.distributed.barrier()
            save_checkpoint(iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
            if is_first and not settings.async_save:
                remove_old()

    return save


def _is_saved(settings: Namespace, iteration: int) -> bool:
    """Whether the checkpoint was loaded from there and nothing was trained since: saving would risk it for nothing."""
    is_same_folder = settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    return is_same_folder and not settings.finetune and get_loaded_iteration() == iteration


def remove_unfinished_checkpoints(folder: str | Path) -> None:
    """Remove what a failed save left: checkpoints newer than the tracker's that were not finished."""
    newest = read_tracker(folder)
    for iteration in saved_iterations(folder):
        if not isinstance(newest, int) or iteration > newest:
            checkpoint = checkpoint_path(folder, iteration)
            try:
                check_structure(checkpoint)
            except Unfinished:
                shutil.rmtree(checkpoint, ignore_errors=True)
            except Damage:
                continue


def _write_and_record(write: Callable[..., None], rank: int, write_buckets: list[tuple], *args: Any) -> None:
    """Write this rank's files, then record them.

    Args:
        write: the writer's function, which takes the other arguments.
        rank: of the process that trains.
        write_buckets: the first element of each is the path of the file that it goes to.
    """
    write(rank, write_buckets, *args)
    record_rank([Path(bucket[0]) for bucket in write_buckets], rank)


def _seal(checkpoint: Path) -> None:
    """Write the manifest on the first rank; if that fails, fail on all.

    Raises:
        CheckpointException: naming what was not written.
    """
    outcome: list[BaseException | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            write_manifest(checkpoint)
        except (Damage, OSError) as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointException("write", {0: (outcome[0], None)})
