"""Damage of a checkpoint's layout that leaves a readable pickle of the right classes."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from maskmoe.checkpoint.integrity import LAYOUT_FILE, Damage, check_structure
from maskmoe.conversion.megatron_models import MARKER


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
    with pytest.raises(Damage, match=r"__0_0\.distcp has 10 of at least 11 bytes"):
        check_structure(tmp_path)


@pytest.mark.parametrize("place", [(7, 0, 8), (None, 0, 8), (b"__0_0.distcp", 0, 8), ("__0_0.distcp", "2", "8")])
def test_place_of_wrong_types(tmp_path, place):
    write_checkpoint(tmp_path, *place)
    with pytest.raises(Damage, match=r"\.metadata is damaged"):
        check_structure(tmp_path)
