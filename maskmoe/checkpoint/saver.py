"""Saves the checkpoints of a run whole: into empty folders, with a digest of every file."""

import queue
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.training import print_rank_0, training
from megatron.training.async_utils import is_empty_async_queue
from megatron.training.checkpointing import get_loaded_iteration
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from maskmoe.checkpoint.integrity import record_rank, write_manifest
from maskmoe.checkpoint.series import checkpoint_path, remove_old_checkpoints


class SaveError(Exception):
    """A rank failed to save a checkpoint; the message is that of `describe_failures`, or of the system."""


def describe_failures(error: CheckpointException) -> str:
    """Return what the ranks report about a save or a load that has failed."""
    causes = sorted({str(cause) for cause, _ in error.failures.values()})
    return "; ".join(causes) or "another rank reports the cause"


class CheckpointSaver:
    """Saves checkpoints by Megatron's functions, never into a used folder, and logs how long training stood still.

    An asynchronous save becomes a checkpoint when Megatron finalises it. So the save is logged then, with the time that
    both parts took: the call that starts the save, and the calls until it is finalised.

    Args:
        settings: Megatron's arguments.
    """

    def __init__(self, settings: Namespace) -> None:
        self._settings = settings
        # Megatron's own functions: this object's methods replace their names.
        self._save_checkpoint, self._finalize = training.save_checkpoint, training.maybe_finalize_async_save
        self._unfinished: list[int] = []  # iterations
        self._seconds = 0.0  # for which training has stood still because of the unfinished saves
        self._last_saved: int | None = None
        self._retain_interval: int | None = None

    def save(self, iteration: int, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint unless it exists already; raise `SaveError` if a rank failed to save.

        Megatron saves after the last iteration, before the batch size changes, and after a step that gave NaN, even if
        the iteration is saved already. Saving it again could lose an intact checkpoint.
        """
        settings = self._settings
        if not settings.save:  # Megatron saves after a step that gave NaN again, whether or not there is a folder
            return
        # Hide the interval from Megatron, which may remove the last intact checkpoint if the newest one is damaged, and
        # which fails if the tracker file names no iteration, as in the folder of an imported model.
        if settings.save_retain_interval is not None:
            self._retain_interval, settings.save_retain_interval = settings.save_retain_interval, None
        if iteration == self._last_saved or self._has_loaded(iteration):
            print_rank_0(f"the checkpoint of iteration {iteration} is in {settings.save} already")
            return
        start = time.perf_counter()
        with _failures_as_save_errors():
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(checkpoint_path(settings.save, iteration), ignore_errors=True)
                self._remove_old()
            torch.distributed.barrier()
            self._save_checkpoint(iteration, *args, **kwargs)
            self._last_saved = iteration
        self._unfinished.append(iteration)
        self._seconds += time.perf_counter() - start
        if not settings.async_save:
            self._complete()

    def finalize(self, blocking: bool = False, terminate: bool = False) -> None:
        """Finalise asynchronous saves whose files are written; raise `SaveError` if a rank failed to save."""
        start = time.perf_counter()
        with _failures_as_save_errors():
            # Megatron ends the writer after the last step, but may save once more, with a new writer without the
            # protection of `start_writers`. So the writer of `start_writers` stays, and ends with the rank.
            self._finalize(blocking=blocking, terminate=terminate and self._settings.async_strategy != "mcore")
        self._seconds += time.perf_counter() - start
        if is_empty_async_queue():  # Megatron does not say which of several saves it has finalised
            self._complete()

    def _has_loaded(self, iteration: int) -> bool:
        """Return whether the iteration was loaded from `--save`."""
        settings = self._settings
        is_same_folder = settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
        return is_same_folder and not settings.finetune and get_loaded_iteration() == iteration

    def _complete(self) -> None:
        """Remove old checkpoints, and log the saves, all of which are complete now."""
        if self._unfinished and torch.distributed.get_rank() == 0:
            self._remove_old()
        for iteration in self._unfinished:
            seconds = self._seconds / len(self._unfinished)
            print_rank_0(f"checkpoint of iteration {iteration} saved; training stood still for {seconds:.3g} s")
        self._unfinished, self._seconds = [], 0.0

    def _remove_old(self) -> None:
        """Remove the checkpoints that a run does not keep beside its newest one."""
        newest = get_loaded_iteration() or 0 if self._last_saved is None else self._last_saved
        keep = self._settings.keep_last_checkpoints
        if keep is None and self._retain_interval is not None:
            keep = 1  # Megatron's flag keeps the newest checkpoint and the multiples of the interval
        remove_old_checkpoints(self._settings.save, keep, self._retain_interval, newest)


@contextmanager
def _failures_as_save_errors() -> Iterator[None]:
    """Raise `SaveError` instead of `CheckpointException` and `OSError`, which Megatron also raises without a save."""
    try:
        yield
    except OSError as error:
        raise SaveError(str(error)) from error
    except CheckpointException as error:
        raise SaveError(describe_failures(error)) from error


class SealedSaveStrategy(TorchDistSaveShardedStrategy):
    """Saves like `TorchDistSaveShardedStrategy`, and writes a manifest with the digest of every file.

    Each rank reads its own files back, from the page cache, in the process that wrote them. So asynchronous saving
    stays asynchronous, and no rank reads the files of another rank.
    """

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        """Save in this process, as the overridden method does, and write the manifest.

        Megatron-Core starts a process for a queue of results, which only asynchronous saving needs. The process takes
        seconds to start, and a signal to the process group may end it. So give Megatron-Core a queue of this process.
        """
        # The attribute is declared as None.
        filesystem_async._results_queue = queue.Queue()  # pyrefly: ignore[bad-assignment]
        self._request(sharded_state_dict, Path(checkpoint_dir), "mcore").execute_sync()

    def async_save(
        self, sharded_state_dict: dict, checkpoint_dir: str | Path, async_strategy: str = "nvrx"
    ) -> AsyncRequest:
        """Return the request of an asynchronous save, which also writes the manifest.

        The writing process would share tensors in host memory with training, which changes them, so copy these tensors
        first.
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
    """Return a `WriteBucket` of Megatron-Core in which tensors in host memory are replaced by copies in shared memory.

    A copy that failed later, in the thread that passes the bucket on, would leave training waiting for ever.

    Raises:
        OSError: There is too little shared memory.
    """
    path, storage_key, (bytes_data, tensor_data) = bucket
    try:
        copied = [
            (item, tensor.clone().share_memory_() if tensor.device.type == "cpu" else tensor)
            for item, tensor in tensor_data
        ]
    except RuntimeError as error:
        raise OSError(
            f"no shared memory for the copies of --async-save ({error}): enlarge /dev/shm, or save without --async-save"
        ) from error
    return path, storage_key, (bytes_data, copied)


def _write_and_record(write: Callable[..., None], rank: int, write_buckets: list[tuple], *args: Any) -> None:
    """Write the files of this rank by the function of Megatron's writer, then record them."""
    write(rank, write_buckets, *args)
    record_rank([Path(bucket[0]) for bucket in write_buckets], rank)
