"""The page about hash layers: its commands make a table, and its lines load the table into Megatron-Core's routers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.datasets import write_documents
from support.documentation import DOCS, bash_blocks, blocks, run_script

from maskmoe.routing_mask.mask import RoutingMask

PAGE = DOCS / "hash-layers.md"
VOCAB_SIZE, PADDED_SIZE, NUM_EXPERTS, TOPK = 32000, 32128, 64, 2
LAYERS = (1, 3, 5)  # of the first MoE layers in the pattern


class Router(torch.nn.Module):
    """Has the attributes of Megatron-Core's router that the lines use; some versions have no hash layers."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number, self.is_hash_layer = layer_number, layer_number <= 6
        ids = torch.arange(PADDED_SIZE)[:, None]
        placeholder = (ids + torch.arange(TOPK)) % NUM_EXPERTS
        self.register_buffer("tid2eid", placeholder.int() if self.is_hash_layer else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands of the page have run, for a dataset with the name on the page."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "data").mkdir()
    (folder / "docs").symlink_to(DOCS)
    rng = np.random.default_rng(0)
    write_documents(folder / "data" / "text_document", [rng.zipf(1.2, 50_000) % VOCAB_SIZE])
    result = run_script("\n".join(block.text for block in bash_blocks(PAGE)), folder, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    last_lines, *_ = (block.text for block in blocks(PAGE) if block.language == "text")
    assert last_lines in result.stdout
    return folder


def test_commands_write_and_read_the_same_table(folder: Path) -> None:
    mask, again = (RoutingMask.load(folder / name) for name in ("hash-mask.safetensors", "again.safetensors"))
    assert mask.num_layers == 6
    for layer in range(6):
        assert np.array_equal(mask.visible_sets(layer), again.visible_sets(layer))
    assert (folder / "hash_layers.png").read_bytes().startswith(b"\x89PNG")


def test_lines_load_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = torch.nn.ModuleList([Router(layer_number) for layer_number in range(2, 13, 2)])
    (lines,) = (block.text for block in blocks(PAGE) if block.language == "python")
    exec(lines, {"model": model})
    tables = load_file("tid2eid.safetensors")
    assert [*tables] == [f"decoder.layers.{layer}.mlp.router.tid2eid" for layer in LAYERS]
    placeholder = Router(2).tid2eid[VOCAB_SIZE:]
    for router, table in zip(model[:3], tables.values(), strict=True):
        assert np.array_equal(router.tid2eid[:VOCAB_SIZE], table)
        assert torch.equal(router.tid2eid[VOCAB_SIZE:], placeholder)
    assert all(router.tid2eid is None for router in model[3:])
