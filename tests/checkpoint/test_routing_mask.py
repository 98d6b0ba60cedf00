from pathlib import Path

import pytest

from maskmoe.checkpoint.routing_mask import has_checkpoint, latest_checkpoint, read_routing_mask
from maskmoe.errors import UserError
from maskmoe.routing_mask import MaskRecipe, build_routing_mask


def test_reads_a_mask_file(tmp_path: Path) -> None:
    mask = build_routing_mask(MaskRecipe.from_preset("hash", 4, 2), vocab_size=50)
    mask.save(tmp_path / "mask.safetensors")
    assert read_routing_mask(tmp_path / "mask.safetensors").digest == mask.digest
    assert read_routing_mask(str(tmp_path / "mask.safetensors")).digest == mask.digest


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_routing_mask(tmp_path / "nowhere")


def test_folder_without_a_checkpoint_is_reported(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint in"):
        read_routing_mask(tmp_path)


@pytest.mark.parametrize(
    ("tracker", "folder"), [("120\n", "iter_0000120"), ("release", "release"), ("12345678", "iter_12345678")]
)
def test_finds_the_newest_checkpoint(tracker: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert has_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / folder


@pytest.mark.parametrize("tracker", ["", "metadata", "12 13"])
def test_damaged_tracker_is_reported(tracker: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt"):
        read_routing_mask(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no pickle"], ids=["missing", "empty", "damaged"])
def test_unreadable_checkpoint_is_reported(content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    if content is not None:
        (tmp_path / "iter_0000003").mkdir()
        (tmp_path / "iter_0000003" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="iter_0000003 is not a readable torch_dist checkpoint"):
        read_routing_mask(tmp_path)
