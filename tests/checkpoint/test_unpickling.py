"""Reading a checkpoint of a stranger returns data and runs no code."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from maskmoe.checkpoint.integrity import Damage, check_structure
from maskmoe.checkpoint.unpickling import read_layout


class Command:
    """An object whose pickle runs a command when it is read.

    Args:
        target: the file that the command makes.
    """

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint, as torch writes it."""
    folder = tmp_path / "checkpoint"
    save({"weight": torch.arange(6.0), "settings": {"lr": 1e-3}}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def test_sound_checkpoint_is_read(checkpoint: Path) -> None:
    state = {"weight": torch.zeros(6), "settings": {"lr": 0.0}}
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    assert state["weight"].tolist() == list(range(6))
    assert state["settings"] == {"lr": 1e-3}
    check_structure(checkpoint)


def test_layout_that_runs_a_command_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    layout = pickle.loads((checkpoint / ".metadata").read_bytes())
    layout.planner_data = Command(tmp_path / "ran")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(layout))
    with pytest.raises(Damage, match=r"refusing posix\.system"):
        check_structure(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match=r"refusing posix\.system"):
        FileSystemReader(checkpoint).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.distributed.checkpoint.filesystem.os.system"])
def test_layout_knows_no_other_names(name: str) -> None:
    module, _, attribute = name.rpartition(".") if "filesystem" not in name else (name[:40], "", "os.system")
    stream = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    stream += b"\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="refusing"):
        read_layout(io.BytesIO(stream))


def test_object_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save({"settings": Command(tmp_path / "ran")}, storage_writer=FileSystemWriter(folder), no_dist=True)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        load({"settings": {}}, storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
    assert not (tmp_path / "ran").exists()
