"""The copies of tensors that an asynchronous save hands to the process that writes them."""

import io

import torch

from maskmoe.checkpoint.saving import _copy_host_tensors, _with_own_storages

TENSORS = (
    torch.arange(7, dtype=torch.float32),
    torch.tensor(3, dtype=torch.int64),
    torch.randn(3, 5).bfloat16(),
    torch.randn(4, 6).t(),
    torch.tensor([True, False, True]),
    torch.empty(0, 4),
    torch.randn(2, 3, 4, dtype=torch.float64)[:, 1:],
)


def bucket_of(tensors):
    return "folder/file", "file", ([("name", io.BytesIO(b"object"))], [(f"t{i}", t) for i, t in enumerate(tensors)])


def test_copies_are_equal_and_share_no_memory_with_training():
    tensors = [tensor.clone() for tensor in TENSORS]
    *names, (objects, copies) = _copy_host_tensors(bucket_of(tensors))
    for tensor in tensors:
        tensor.zero_()
    assert names == ["folder/file", "file"]
    assert [name for name, _ in objects] == ["name"]
    for (_, copy), expected in zip(copies, TENSORS, strict=True):
        assert (copy.dtype, copy.shape) == (expected.dtype, expected.shape)
        assert torch.equal(copy, expected)
    storages = {copy.untyped_storage().data_ptr() for _, copy in copies if copy.numel()}
    assert len(storages) == 1  # the writer gets a single file descriptor
    assert copies[0][1].is_shared()


def test_each_tensor_is_written_without_the_others():
    _, _, (_, tensors) = _with_own_storages(_copy_host_tensors(bucket_of(TENSORS)))
    for (_, tensor), expected in zip(tensors, TENSORS, strict=True):
        written, reference = io.BytesIO(), io.BytesIO()
        torch.save(tensor, written)
        torch.save(expected.clone(memory_format=torch.contiguous_format), reference)
        assert len(written.getvalue()) == len(reference.getvalue())
        written.seek(0)
        assert torch.equal(torch.load(written), expected)


def test_a_bucket_without_tensors():
    *_, (objects, tensors) = _with_own_storages(_copy_host_tensors(bucket_of([])))
    assert (len(objects), tensors) == (1, [])
