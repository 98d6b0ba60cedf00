"""Saves: when they count as checkpoints, and the copies of tensors for the process that writes them."""

import io
import shutil
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support.launchers import run_as_ranks
from support.runs import write_checkpoint

from maskmoe.checkpoint.saver import CheckpointSaver, _copy_host_tensors
from maskmoe.checkpoint.series import saved_iterations


def test_copies_are_equal_and_share_no_memory_with_training():
    tensors = [torch.arange(7.0), torch.randn(3, 5).bfloat16(), torch.randn(4, 6).t(), torch.empty(0, 4)]
    expected = [tensor.clone() for tensor in tensors]
    bucket = "folder/file", "file", ([("object", io.BytesIO(b"object"))], list(enumerate(tensors)))
    *names, (objects, copies) = _copy_host_tensors(bucket)
    for tensor in tensors:
        tensor.zero_()
    assert names == ["folder/file", "file"]
    assert [name for name, _ in objects] == ["object"]
    assert all(torch.equal(copy, expected[number]) and copy.is_shared() for number, copy in copies)


def test_lack_of_shared_memory_is_found_before_the_copies_are_passed_on(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("No space left on device (28)")))
    with pytest.raises(OSError, match=r"for the copies of --async-save .*No space left.*: enlarge /dev/shm"):
        _copy_host_tensors(("file", "key", ([], [(0, torch.ones(2))])))


def test_run_without_a_folder_saves_nothing():
    """Megatron asks for a checkpoint before it repeats a step that gave NaN, and then ends with its own code."""
    saver = CheckpointSaver(Namespace(save=None, async_save=False))
    saver.save(5)


def write_when_told(folder: Path, rank: int, iteration: int) -> None:
    """Write a rank's file once the test says so, in the process that writes checkpoints."""
    while not (folder / f"write{rank}").exists():
        time.sleep(0.01)
    (folder / f"iter_{iteration:07d}" / f"file{rank}").touch()


def save_asynchronously(folder: Path) -> list[tuple[list[int], bool]]:
    """Save iteration 2 by Megatron's queue of asynchronous saves; return checkpoints and whether it is logged, by time.

    The first rank's file is written before the second rank's.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.training import async_utils, training

    from maskmoe.checkpoint import saver
    from maskmoe.megatron_compat.globals import global_args

    settings = {"save": str(folder), "load": None, "async_save": True, "async_strategy": "mcore"}
    args = Namespace(**settings, keep_last_checkpoints=1, save_retain_interval=None, use_persistent_ckpt_worker=False)
    rank, logged, seen = torch.distributed.get_rank(), [], []

    def finish() -> None:
        shutil.rmtree(folder / "iter_0000002")
        write_checkpoint(folder, 2)

    def save_checkpoint(iteration: int) -> None:
        if rank == 0:
            (folder / f"iter_{iteration:07d}").mkdir()
        finalize = [finish] if rank == 0 else []
        async_utils.schedule_async_save(AsyncRequest(write_when_told, (folder, rank, iteration), finalize))

    training.save_checkpoint, saver.print_rank_0 = save_checkpoint, logged.append
    with global_args(args):
        own = CheckpointSaver(args)
        own.save(2)

        def look(blocking: bool = False) -> None:
            torch.distributed.barrier()
            own.finalize(blocking=blocking)
            torch.distributed.barrier()
            seen.append((saved_iterations(folder), bool(logged)))

        look()
        if rank == 0:
            (folder / "write0").touch()
            time.sleep(1)
        look()
        if rank == 0:
            (folder / "write1").touch()
        look(blocking=True)
    return seen


def test_asynchronous_save_counts_once_all_ranks_have_written(tmp_path):
    write_checkpoint(tmp_path, 1)
    unfinished = [([2, 1], False), ([2, 1], False)]
    assert run_as_ranks(save_asynchronously, tmp_path, tmp_path) == [[*unfinished, ([2], True)]] * 2
