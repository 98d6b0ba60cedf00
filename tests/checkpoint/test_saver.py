"""The copies of tensors that an asynchronous save hands to the process that writes them."""

import io

import torch

from maskmoe.checkpoint.saver import _copy_host_tensors


def test_copies_are_equal_and_share_no_memory_with_training():
    tensors = [torch.arange(7.0), torch.randn(3, 5).bfloat16(), torch.randn(4, 6).t(), torch.empty(0, 4)]
    expected = [tensor.clone() for tensor in tensors]
    bucket = "folder/file", "file", ([("object", io.BytesIO(b"object"))], list(enumerate(tensors)))
    *names, (objects, copies) = _copy_host_tensors(bucket)
    for tensor in tensors:
        tensor.zero_()
    assert names == ["folder/file", "file"]
    assert [name for name, _ in objects] == ["object"]
    assert all(torch.equal(copy, expected[number]) for number, copy in copies)
