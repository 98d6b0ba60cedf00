"""Tensors in files, of which several threads read blocks at the same time."""

from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmoe.conversion.blocks import Block, StoredTensor
from maskmoe.errors import UserError

NUM_FILES, LENGTH = 80, 2000
START = 5  # a position that is not a multiple of an element's size


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), data=st.data())
def test_any_block(shape, data, tmp_path):
    elements = torch.arange(prod(shape), dtype=torch.int16)
    (tmp_path / "file").write_bytes(bytes(START) + elements.numpy().tobytes())
    tensor = elements.view(shape).permute(data.draw(st.permutations(range(len(shape)))))
    shape = tuple(tensor.shape)
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(shape, offsets, strict=True))
    block = Block("t", offsets, sizes)
    stored = StoredTensor(tmp_path / "file", START, tensor.to("meta"))
    assert torch.equal(stored.read(block), tensor[block.slices])


def test_missing_and_short_files(tmp_path):
    stored = StoredTensor(tmp_path / "file", START, torch.empty(4, dtype=torch.int32, device="meta"))
    with pytest.raises(UserError, match="file cannot be read: No such file"):
        stored.read(Block.whole("t", (4,)))
    for length in (0, START, START + 15):
        stored.path.write_bytes(bytes(length))
        with pytest.raises(UserError, match="file is damaged: it ends before"):
            stored.read(Block.whole("t", (4,)))


def test_threads_read_many_files(tmp_path):
    """No thread reads from a file that another thread has opened."""
    tensors = []
    for number in range(NUM_FILES):
        path = tmp_path / str(number)
        tensor = torch.full((LENGTH,), number, dtype=torch.int32)
        path.write_bytes(tensor.numpy().tobytes())
        tensors.append(StoredTensor(path, 0, tensor.to("meta")))

    def read(turn: int) -> bool:
        number = (turn // 4) % NUM_FILES
        return bool((tensors[number].read(Block.whole("t", (LENGTH,))) == number).all())

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(20 * NUM_FILES)))
