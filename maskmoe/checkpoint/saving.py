"""Saves checkpoints with a manifest, never over existing files, and removes checkpoints that are no longer wanted."""

import queue
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.training import get_args, print_rank_0
from megatron.training.checkpointing import get_loaded_iteration
from torch.distributed.checkpoint.utils import _DistWrapper

from maskmoe.checkpoint.integrity import record_rank, write_manifest
from maskmoe.checkpoint.series import checkpoint_path, read_tracker, remove_old_checkpoints, saved_iterations


class SealedSaveStrategy(TorchDistSaveShardedStrategy):
    """Saves like `TorchDistSaveShardedStrategy`, and writes a manifest with the digest of every file.

    Each rank reads its own files back, from the page cache, in the process that wrote them. So asynchronous saving
    stays asynchronous, and no rank reads the files of another rank.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        """Save in this process, as the overridden method does, and write the manifest.

        Megatron-Core starts a process for a queue of results, which only asynchronous saving needs. The process takes
        seconds to start, and a signal to the process group may end it. So the queue is one of this process here.

        Args:
            sharded_state_dict: the state to save.
            checkpoint_dir: the folder of the checkpoint.
        """
        process_queue = filesystem_async._results_queue
        # The attribute is declared as None.
        filesystem_async._results_queue = queue.Queue()  # pyrefly: ignore[bad-assignment]
        try:
            self._request(sharded_state_dict, Path(checkpoint_dir), "mcore").execute_sync()
        finally:
            filesystem_async._results_queue = process_queue

    def async_save(
        self, sharded_state_dict: dict, checkpoint_dir: str | Path, async_strategy: str = "nvrx"
    ) -> AsyncRequest:
        """Return the request of an asynchronous save, which also writes the manifest.

        Tensors in host memory are copied first. The writing process would otherwise share them with training, which
        changes them. Tensors on a GPU are copied to the host in any case.

        Args:
            sharded_state_dict: the state to save.
            checkpoint_dir: the folder of the checkpoint.
            async_strategy: Megatron's name of the implementation of asynchronous saving.
        """
        request = self._request(sharded_state_dict, Path(checkpoint_dir), async_strategy)
        if request.async_fn is not None:
            _, write_buckets, _ = request.async_fn_args
            # Change the list in place: the function that moves tensors to the host holds the same list.
            write_buckets[:] = [_copy_host_tensors(bucket) for bucket in write_buckets]
        return request

    def _request(self, sharded_state_dict: dict, checkpoint_dir: Path, async_strategy: str) -> AsyncRequest:
        """Return Megatron's request, extended by the records of all ranks and by the manifest."""
        request = super().async_save(sharded_state_dict, checkpoint_dir, async_strategy)
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write_and_record, request.async_fn))
        # The first rank writes the manifest. If it fails, all ranks raise a `CheckpointException` with the cause.
        first_rank = _DistWrapper(group=None, use_dist=True, coordinator_rank=0)
        request.finalize_fns.append(partial(first_rank.broadcast, "write", partial(write_manifest, checkpoint_dir)))
        return request


def _copy_host_tensors(bucket: tuple) -> tuple:
    """Return a `WriteBucket` of Megatron-Core in which tensors in host memory are copied."""
    path, storage_key, (bytes_data, tensor_data) = bucket
    copied = [(item, tensor.clone() if tensor.device.type == "cpu" else tensor) for item, tensor in tensor_data]
    return path, storage_key, (bytes_data, copied)


def saving_whole_checkpoints(
    save_checkpoint: Callable[..., None], while_saving: Callable[[], AbstractContextManager]
) -> Callable[..., None]:
    """Wrap Megatron's `save_checkpoint` so that it never writes into a used folder, and removes old checkpoints.

    Args:
        save_checkpoint: the function of Megatron.
        while_saving: makes a context manager that is entered around each save.
    """

    @wraps(save_checkpoint)
    def save(iteration: int, *args: Any, non_persistent_ckpt: bool = False, **kwargs: Any) -> None:
        settings = get_args()
        assert settings is not None
        if _is_saved(settings, iteration):
            print_rank_0(f"the checkpoint of iteration {iteration} is in {settings.save} already")
            return
        is_first = torch.distributed.get_rank() == 0
        retention = settings.keep_last_checkpoints, settings.save_retain_interval
        with while_saving():
            if is_first and not non_persistent_ckpt:
                shutil.rmtree(checkpoint_path(settings.save, iteration), ignore_errors=True)
                remove_old_checkpoints(settings.save, *retention)
            torch.distributed.barrier()
            save_checkpoint(iteration, *args, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
            if is_first and not settings.async_save:
                remove_old_checkpoints(settings.save, *retention)

    return save


def _is_saved(settings: Namespace, iteration: int) -> bool:
    """Return whether the checkpoint was loaded from the folder in `--save`, with no iteration trained since.

    Saving would replace a sound checkpoint by an equal one, and could lose it.
    """
    is_same_folder = settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    return is_same_folder and not settings.finetune and get_loaded_iteration() == iteration


def remove_unfinished_checkpoints(folder: str | Path) -> None:
    """Remove unfinished checkpoints that are newer than the checkpoint in the tracker file, which failed saves left."""
    newest = read_tracker(folder)
    for iteration in saved_iterations(folder):
        checkpoint = checkpoint_path(folder, iteration)
        is_newer = not isinstance(newest, int) or iteration > newest
        if is_newer and not (checkpoint / CONFIG_FNAME).exists():  # Megatron writes this file last
            shutil.rmtree(checkpoint, ignore_errors=True)


def _write_and_record(write: Callable[..., None], rank: int, write_buckets: list[tuple], *args: Any) -> None:
    """Write the files of this rank, then record them.

    Args:
        write: the function of Megatron's writer, which gets all further arguments.
        rank: the rank that trains.
        write_buckets: the contents of the files; the first element of each bucket is the path of its file.
        *args: further arguments of `write`.
    """
    write(rank, write_buckets, *args)
    record_rank([Path(bucket[0]) for bucket in write_buckets], rank)
