"""Reading routing masks from files and from checkpoints."""

from pathlib import Path

import pytest

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask


def test_reads_a_mask_file(tmp_path: Path) -> None:
    mask = build_routing_mask(MaskRecipe.from_preset("hash", 4, 2), vocab_size=50)
    mask.save(tmp_path / "mask.safetensors")
    assert read_routing_mask(tmp_path / "mask.safetensors").digest == mask.digest
    assert read_routing_mask(str(tmp_path / "mask.safetensors")).digest == mask.digest


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_routing_mask(tmp_path / "nowhere")


def test_folder_without_a_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        read_routing_mask(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle"], ids=["empty", "damaged"])
def test_unreadable_checkpoint_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        read_routing_mask(tmp_path)
