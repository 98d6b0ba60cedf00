"""Writes the files of checkpoints with a manifest of their digests."""

import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.utils import _DistWrapper

from maskmoe.checkpoint.integrity import record_rank, write_manifest


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
    """Return a `WriteBucket` of Megatron-Core in which tensors in host memory are replaced by copies."""
    path, storage_key, (bytes_data, tensor_data) = bucket
    copied = [(item, tensor.clone() if tensor.device.type == "cpu" else tensor) for item, tensor in tensor_data]
    return path, storage_key, (bytes_data, copied)


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
