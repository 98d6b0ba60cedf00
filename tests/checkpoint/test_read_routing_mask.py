"""Reading routing masks and tables of hash layers from files and from checkpoints."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_lines import run_command
from torch.distributed import checkpoint as torch_checkpoint

from maskmoe.checkpoint.expert_tables import read_expert_tables
from maskmoe.checkpoint.read_routing_mask import (
    CHECKPOINT_PREFIX,
    buffers_of_routing_mask,
    has_expert_tables,
    read_routing_mask,
)
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import RoutingMask


@pytest.mark.parametrize("content", [b"", b"no pickle"], ids=["empty", "damaged"])
def test_unreadable_checkpoint_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        read_routing_mask(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_only_regular_files_of_a_checkpoint_are_read(tmp_path: Path, kind: str) -> None:
    mask = build_routing_mask(MaskRecipe.from_preset("hash", 4, 2), vocab_size=50)
    buffers = {f"{CHECKPOINT_PREFIX}{name}": buffer for name, buffer in buffers_of_routing_mask(mask).items()}
    torch_checkpoint.save(buffers, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert read_routing_mask(tmp_path / "checkpoint").digest == mask.digest
    (path,) = (tmp_path / "checkpoint").glob("*.distcp")
    path.rename(tmp_path / "outside")
    path.symlink_to("../outside") if kind == "link" else os.mkfifo(path)
    with pytest.raises(UserError, match=r"\.distcp is (a link to a file outside its folder|not a regular file)"):
        read_routing_mask(tmp_path / "checkpoint")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tables_of_a_checkpoint_of_megatron(tmp_path: Path) -> None:
    """Megatron-Core's hybrid models number all layers, so the second hash layer of `*E*E*E` has the number 3."""
    tables = {layer: torch.randperm(8).repeat(50, 1)[:, :2].int() for layer in (1, 3)}
    tensors = {f"decoder.layers.{layer}.mlp.router.tid2eid": table for layer, table in tables.items()}
    other = {f"decoder.layers.{layer}.mlp.router.weight": torch.zeros(8, 4) for layer in (1, 3, 5)}
    torch_checkpoint.save(tensors | other, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert read_expert_tables(tmp_path / "checkpoint").keys() == tensors.keys()
    model = "--num-experts 8 --num-layers 3 --hybrid-layer-pattern *E*E*E --vocab-size 45 --output mask"
    process = run_command("mask", "--expert-table", "checkpoint", *model.split(), folder=tmp_path)
    assert process.code == 0, process.errors
    mask = RoutingMask.load(tmp_path / "mask")
    assert mask.vocab_size == 45
    for layer, table in enumerate(tables.values()):
        assert np.flatnonzero(mask.visible_sets(layer)[7]).tolist() == sorted(table[7].tolist())
    assert mask.visible_sets(2).all()
    torch_checkpoint.save(other, checkpoint_id=tmp_path / "learned", no_dist=True)
    with pytest.raises(UserError, match="learned holds no expert table: no tensor is named as decoder"):
        read_expert_tables(tmp_path / "learned")
    assert has_expert_tables(tmp_path / "checkpoint")
    assert not has_expert_tables(tmp_path / "learned")
