"""Reading a checkpoint of a stranger returns data and runs no code; a damaged layout is named."""

import io
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from maskmoe.checkpoint.integrity import Manifest, check_structure, record_rank, write_manifest
from maskmoe.checkpoint.reading import LAYOUT_FILE, CheckpointError, read_checkpoint_layout, read_layout
from maskmoe.conversion.megatron_models import MARKER


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


def test_path_that_python_3_13_has_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 has no module `pathlib._local`."""
    layout = Metadata({}, storage_data={}, storage_meta=StorageMeta(checkpoint_id=tmp_path))
    (tmp_path / LAYOUT_FILE).write_bytes(pickle.dumps(layout))
    monkeypatch.setitem(sys.modules, "pathlib._local", None)
    assert read_checkpoint_layout(tmp_path) == layout


def test_only_what_was_saved_is_read(checkpoint: Path) -> None:
    saved = checkpoint.rename(checkpoint.with_name("iter_0000008"))
    record_rank(sorted(saved.glob("*.distcp")), 0)
    write_manifest(saved)
    check_structure(saved)
    (saved / "common.pt").touch()
    with pytest.raises(CheckpointError, match=r"iter_0000008 holds common\.pt, which was not saved with it"):
        check_structure(saved)
    (saved / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="iter_0000004 was saved as the checkpoint of iteration 8"):
        check_structure(saved.rename(checkpoint.with_name("iter_0000004")))
    check_structure(checkpoint.with_name("iter_0000004").rename(checkpoint.with_name("best")))


def test_layout_that_runs_a_command_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    layout = pickle.loads((checkpoint / ".metadata").read_bytes())
    layout.planner_data = Command(tmp_path / "ran")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(layout))
    with pytest.raises(CheckpointError, match=r"refusing posix\.system"):
        check_structure(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match=r"refusing posix\.system"):
        FileSystemReader(checkpoint).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        # Modules whose classes layouts have.
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "dataclass"),
    ],
)
def test_layout_knows_no_other_names(module: str, attribute: str) -> None:
    stream = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    stream += b"\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="refusing"):
        read_layout(io.BytesIO(stream))


def test_object_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save({"settings": Command(tmp_path / "ran")}, storage_writer=FileSystemWriter(folder), no_dist=True)
    with pytest.raises(CheckpointException, match="settings is damaged, or names code that would run"):
        load({"settings": {}}, storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
    assert not (tmp_path / "ran").exists()


def write_checkpoint(folder: Path, *place: Any) -> None:
    """Write a checkpoint with one file, whose layout places one object in it."""
    layout = Metadata({}, storage_data={MetadataIndex("object"): _StorageInfo(*place)})
    (folder / LAYOUT_FILE).write_bytes(pickle.dumps(layout))
    (folder / "metadata.json").write_text(json.dumps(MARKER))
    (folder / "__0_0.distcp").write_bytes(bytes(10))


def test_object_in_a_file(tmp_path):
    write_checkpoint(tmp_path, "__0_0.distcp", 2, 8)
    check_structure(tmp_path)
    write_checkpoint(tmp_path, "__0_0.distcp", 3, 8)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has 10 of at least 11 bytes"):
        check_structure(tmp_path)


@pytest.mark.parametrize("is_megatrons", [True, False])
def test_a_manifest_without_all_sizes_leaves_them_to_the_layout(tmp_path, is_megatrons):
    """Megatron's own manifests have no sizes; a stranger's may lack files."""
    write_checkpoint(tmp_path, "__0_0.distcp", 3, 8)
    if is_megatrons:
        Manifest(files=Manifest.of_files(tmp_path, [LAYOUT_FILE, "__0_0.distcp"]).files).save(tmp_path)
    else:
        Manifest.of_files(tmp_path, [LAYOUT_FILE]).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has 10 of at least 11 bytes"):
        check_structure(tmp_path)
