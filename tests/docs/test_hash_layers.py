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
VOCAB_SIZE = 32000


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
    """The lines run on stand-ins for Megatron-Core's routers: some of its versions have no hash layers."""
    monkeypatch.chdir(folder)
    model, placeholder = torch.nn.Module(), torch.zeros(VOCAB_SIZE + 128, 2, dtype=torch.int32)
    for number in (2, 4, 6, 8):
        router = torch.nn.Module()
        router.layer_number, router.is_hash_layer, router.tid2eid = number, number <= 6, placeholder.clone()
        model.add_module(str(number), router)
    (lines,) = (block.text for block in blocks(PAGE) if block.language == "python")
    exec(lines, {"model": model})
    tables = [*load_file("tid2eid.safetensors").values(), placeholder]
    for router, table in zip(model.children(), tables, strict=True):
        assert np.array_equal(router.tid2eid[:VOCAB_SIZE], table[:VOCAB_SIZE])
        assert not router.tid2eid[VOCAB_SIZE:].any()
