"""Files of models that we read and write, compared with the library's own code; unusable ones are refused."""

import errno
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maskmoe.conversion.model_files import UNFINISHED, SafetensorsSource, output_folder, write_safetensors
from maskmoe.conversion.tensor_sources import Block, MemorySource
from maskmoe.errors import UserError

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "a": torch.randn(10, 30),
    "b": torch.randn(3, 4, 5).bfloat16(),
    "ids": torch.arange(6, dtype=torch.int16).view(2, 3),
    "c": torch.randn(100, 10).half(),
    "scalar": torch.tensor(1.5),
}


@pytest.mark.parametrize(("max_file_bytes", "num_files"), [(10**9, 1), (1300, 3), (1, 6)])
def test_written_files_are_read_by_the_library(tmp_path, max_file_bytes, num_files):
    write_safetensors(MemorySource(TENSORS), TENSORS, tmp_path, max_file_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (num_files > 1)
    loaded = {}
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max_file_bytes or len(tensors) == 1
        if num_files > 1:
            assert all(json.loads(index.read_text())["weight_map"][name] == file for name in tensors)
        loaded |= tensors
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    source = SafetensorsSource(tmp_path)
    read = {name: source.read(Block.whole(name, tensor.shape)) for name, tensor in TENSORS.items()}
    torch.testing.assert_close((loaded, read), (TENSORS, TENSORS), rtol=0, atol=0)
    for block in (Block("a", (2, 3), (5, 20)), Block("a", (9, 0), (1, 30)), Block("b", (1, 2, 1), (1, 2, 3))):
        assert torch.equal(source.read(block), TENSORS[block.tensor][block.slices])


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(MemorySource(TENSORS), TENSORS, folder, 1300)
    return folder


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors does not exist"):
        SafetensorsSource(sharded)


def test_the_index_of_an_older_model_is_ignored(sharded):
    """Transformers leaves the index in the folder when it saves a model again in one file."""
    save_file({"new": torch.ones(3)}, sharded / "model.safetensors")
    source = SafetensorsSource(sharded)
    assert source.tensors.keys() == {"new"}
    assert source.files == [sharded / "model.safetensors"]


def test_damaged_shard(sharded):
    path = sharded / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors is damaged"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../a"}}'])
def test_damaged_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("is_there", [False, True])
def test_folder_gets_its_name_when_it_is_complete(tmp_path, is_there):
    save = tmp_path / "made" / "model"
    if is_there:
        save.mkdir(parents=True)
    with output_folder(save) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("content")
        assert not (save / "part").exists()
    assert (save / "part" / "file").read_text() == "content"
    assert os.listdir(save.parent) == ["model"]


def fill(save, failure=None, meanwhile=lambda: None):
    """Write a file into an output folder; then call a function, and raise an exception if one is given."""
    with output_folder(save) as folder:
        (folder / "file").write_text("content")
        meanwhile()
        if failure is not None:
            raise failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("NaN")])
def test_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)):
        fill(tmp_path / "model", failure)
    assert os.listdir(tmp_path) == []


def test_sigterm_leaves_nothing(tmp_path):
    with pytest.raises(SystemExit):
        fill(tmp_path / "model", meanwhile=lambda: signal.raise_signal(signal.SIGTERM))
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_of_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*model: No space left on device$"):
        fill(tmp_path / "model", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert os.listdir(tmp_path) == []


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / f"model{UNFINISHED}").mkdir()
    for name, words in (("whole", "is not empty"), ("file", "is not empty"), ("model", "unfinished: File exists")):
        with pytest.raises(UserError, match=words):
            fill(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", f"model{UNFINISHED}", "whole"]


def test_a_link_to_an_empty_folder_stays(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "model").symlink_to("disk/empty")
    fill(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["empty"]
    assert os.listdir(tmp_path / "disk" / "empty")
