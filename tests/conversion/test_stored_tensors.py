"""Tensors in files that several threads read at the same time."""

from concurrent.futures import ThreadPoolExecutor

import torch

from maskmoe.conversion import stored_tensors
from maskmoe.conversion.blocks import Block, TensorSpec
from maskmoe.conversion.stored_tensors import StoredTensor, check_length

NUM_FILES, LENGTH = 80, 2000  # more files than stay open


def test_threads_read_more_files_than_stay_open(tmp_path):
    """No thread closes a file that another thread is reading, even if it opens more files than may stay open."""
    assert NUM_FILES > stored_tensors._OPEN_FILES
    tensors = []
    for number in range(NUM_FILES):
        path = tmp_path / str(number)
        path.write_bytes(torch.full((LENGTH,), number, dtype=torch.int32).numpy().tobytes())
        tensors.append(StoredTensor(path, 0, TensorSpec((LENGTH,), torch.int32)))

    def read(turn: int) -> bool:
        number = (turn // 4) % NUM_FILES
        check_length(tensors[number].path, 4 * LENGTH)
        return bool((tensors[number].read(Block.whole("t", (LENGTH,))) == number).all())

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(20 * NUM_FILES)))
