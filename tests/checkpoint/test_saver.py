"""Saves: the copies of tensors for the process that writes them, and runs that save nothing."""

import io
from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch

from maskmoe.checkpoint.saver import CheckpointSaver, _copy_host_tensors


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
