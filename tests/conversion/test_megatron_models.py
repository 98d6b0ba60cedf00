"""Checkpoints in `torch_dist` format that we read and write in blocks, compared with torch's and Megatron's code."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint as torch_checkpoint

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.conversion.megatron_models import COMMON_STATE, MARKER, TorchDistSource, write_torch_dist
from maskmoe.conversion.tensor_sources import Block, MemorySource, row_major_blocks
from maskmoe.errors import UserError


def load_with_torch(checkpoint, tensors):
    """Read the tensors of a checkpoint with torch's own reader."""
    loaded = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in tensors.items()}
    torch_checkpoint.load(loaded, storage_reader=torch_checkpoint.FileSystemReader(checkpoint), no_dist=True)
    return loaded


def write_checkpoint(folder, tensors, objects, max_file_bytes=1 << 30):
    checkpoint = folder / "checkpoint"
    files = write_torch_dist(MemorySource(tensors), objects, checkpoint, max_file_bytes)
    assert files == sorted(path.name for path in checkpoint.iterdir())
    (checkpoint / "metadata.json").write_text(json.dumps(MARKER))
    return checkpoint


def same_bits(first, second):
    return first.dtype == second.dtype and torch.equal(
        first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8)
    )


def test_tensors_equal_those_that_torch_reads(checkpoints):
    checkpoint = checkpoint_path(checkpoints("ranks"), 2)
    source = TorchDistSource(checkpoint)
    assert any(name.startswith("optimizer.") for name in source.tensors)
    rng = random.Random(0)
    for name, expected in load_with_torch(checkpoint, source.tensors).items():
        spec = source.tensors[name]
        assert same_bits(source.read(Block.whole(name, spec.shape)), expected)
        parts = [source.read(block).reshape(-1) for block in row_major_blocks(name, spec, 1000)]
        assert same_bits(torch.cat(parts), expected.reshape(-1))
        starts = tuple(rng.randrange(size) for size in spec.shape)
        sizes = tuple(rng.randint(1, size - start) for start, size in zip(starts, spec.shape, strict=True))
        block = Block(name, starts, sizes)
        assert torch.equal(source.read(block), expected[block.slices])


def test_chunk_that_is_not_in_row_major_order(tmp_path):
    """The strides of a tensor are kept in the file that torch saves."""
    values = {"t": torch.arange(12.0).view(3, 4).t(), "u": torch.arange(10)[2:7], "s": torch.tensor(4.0)}
    torch_checkpoint.save(values, checkpoint_id=tmp_path, no_dist=True)
    source = TorchDistSource(tmp_path)
    for name, value in values.items():
        assert torch.equal(source.read(Block.whole(name, value.shape)), value)
    assert torch.equal(source.read(Block("t", (1, 1), (2, 2))), values["t"][1:3, 1:3])


TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int32, torch.uint8)


@pytest.mark.parametrize("max_file_bytes", [1, 10**5, 10**9])
def test_written_tensors_are_read_by_torch(tmp_path, max_file_bytes, monkeypatch):
    monkeypatch.setattr("maskmoe.conversion.megatron_models.BLOCK_BYTES", 5000)
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 255, (3, 50, 70), generator=generator).to(dtype) for dtype in TYPES} | {
        "scalar": torch.tensor(2.5),
        "row": torch.ones(7),
    }
    checkpoint = write_checkpoint(tmp_path, tensors, {COMMON_STATE: [{"iteration": 0}]}, max_file_bytes)
    source = TorchDistSource(checkpoint)
    loaded = load_with_torch(checkpoint, source.tensors)
    assert b"pathlib" not in (checkpoint / ".metadata").read_bytes()  # Python 3.12 could not read paths of Python 3.13
    for name, tensor in tensors.items():
        assert same_bits(loaded[name], tensor)
        assert same_bits(source.read(Block.whole(name, tensor.shape)), tensor)
    assert read_common_state(checkpoint) == {"iteration": 0}
    sizes = [path.stat().st_size for path in checkpoint.glob("*.distcp")]
    # An archive holds up to 2000 bytes besides the 5000 bytes of a chunk.
    assert len(sizes) == 2 if max_file_bytes == 10**9 else max(sizes) <= max(1, max_file_bytes // 5000) * 7000


@given(data=st.data())
def test_damage_is_reported_or_harmless(data, checkpoints, tmp_path):
    """A flipped bit in the layout or in an archive raises a UserError of one line, or nothing."""
    checkpoint = tmp_path / "copy"
    if not checkpoint.exists():
        shutil.copytree(checkpoint_path(checkpoints("rich"), 2), checkpoint)
    path = checkpoint / data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        message = read_everything(checkpoint)
    finally:
        path.write_bytes(original)
    assert "\n" not in message


def read_everything(checkpoint) -> str:
    """Read a checkpoint; return the message of a UserError, empty if there is none."""
    try:
        source = TorchDistSource(checkpoint)
        read_common_state(checkpoint)
        for name, spec in source.tensors.items():
            source.read(Block.whole(name, spec.shape))
    except UserError as error:
        return str(error)
    return ""
