"""Runs tools/simulate_dispatch.py as a user does."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.small_cases import VOCAB_SIZE, count, make_mask, write_data
from support.tools import assert_bad_input, run_tool

from maskmoe.analysis.dispatch_cost import Cluster, Layout, Link, Masks, MicroBatches, Simulation, Workload
from maskmoe.analysis.dispatch_cost.report import _PANELS, draw_plot
from maskmoe.analysis.dispatch_cost.variants import VARIANTS
from maskmoe.data.indexed_dataset import IndexedDatasetWriter, open_tokens
from maskmoe.routing_mask import RoutingMask


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a dataset, a dataset with an id that is not in the mask, and a mask of two layers."""
    folder = tmp_path_factory.mktemp("tool")
    make_mask(count(write_data(folder)), num_experts=32, frequent_visible=4, num_layers=2).save(
        folder / "mask.safetensors"
    )
    with IndexedDatasetWriter(folder / "foreign", np.uint16) as dataset:
        dataset.add_document(np.arange(VOCAB_SIZE + 1))
    return folder


def run(folder: Path, *changes: object) -> subprocess.CompletedProcess:
    """Run on a small case; `changes` are further flags, which override the flags of the case."""
    lists = {"--data-path": ["text"], "--topk": [2], "--num-gpus": [16, 8, 64]}
    case = [word for flag, values in lists.items() if flag not in changes for word in (flag, *values)]
    case += ["--routing-mask", "mask.safetensors", "--hidden-size", 64, "--tokens-per-rank", 50, "--gpus-per-node", 4]
    return run_tool("simulate_dispatch", *case, *changes, cwd=folder)


def test_outputs(folder):
    process = run(folder, "--topk", 2, 4, "--output", "results.json", "--plot", "plot.png", "--layer", 2)
    assert process.returncode == 0, process.stderr
    assert "top-2" in process.stdout
    assert "top-4" in process.stdout
    assert "impossible: 32 experts are fewer than 64 expert-parallel ranks" in process.stdout
    assert process.stdout.endswith("written          results.json\nwritten          plot.png\n")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "results.json").read_text())
    assert content["settings"]["layer"] == 2
    assert content["settings"]["num_experts"] == 32
    cases = [(result["topk"], result["num_gpus"], result["variant"]) for result in content["results"]]
    assert cases == [(k, gpus, variant.name) for k in (2, 4) for gpus in (8, 16, 64) for variant in VARIANTS]
    for result in content["results"]:
        assert ("impossible" in result) != ("seconds" in result)
        if result["variant"] == "rank-local mask, planned" and result["num_gpus"] == 8:
            assert result["rows"] == 50


def test_plot_without_a_possible_variant_is_left_out(folder):
    process = run(folder, "--num-gpus", 64, 128, "--plot", "nothing.png")
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("no plot          nothing.png: every variant is impossible, see the table\n")
    assert not (folder / "nothing.png").exists()


def test_plot_has_no_panel_without_values(folder, tmp_path, monkeypatch):
    """All GPUs are in one node, and one of the layouts is impossible."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    mask, frequency = RoutingMask.load(folder / "mask.safetensors"), count(folder / "text")
    batches, workload = MicroBatches(open_tokens(folder / "text"), 50), Workload((2,), 50, 64, 2, 32, mask.num_layers)
    cluster = Cluster(Link(1e9, 1e-6), Link(1e9, 1e-6))
    simulation = Simulation(Masks(mask, [0], frequency), batches, cluster, workload, 0)
    draw_plot(simulation.run([Layout(8, 8, 8), Layout(64, 64, 64)]), tmp_path / "plot.png")
    panels = [axes for axes in figures[0].axes if axes.axison]
    assert [axes.get_title() for axes in panels] == [title for title, *_ in _PANELS[1:]]
    assert all(axes.lines for axes in panels)
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["8"]


def test_same_seed_same_results(folder):
    first, second, other = (run(folder, "--seed", seed).stdout for seed in (3, 3, 4))
    assert first == second != other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--data-path", "missing"], ["missing.idx does not exist"]),
        (["--data-path", "foreign"], ["mask.safetensors", "100 ids", "token 100 has id 100"]),
        (["--routing-mask", "text.idx"], ["text.idx"]),
        (["--topk", 33], ["top-k must be 1 to 32"]),
        (["--layer", 3], ["--layer is 3", "layers 1 to 2"]),
        (["--layer", 0], ["--layer must be at least 1, not 0"]),
        (["--tokens-per-rank", 3001], ["3,000 tokens"]),
        (["--tokens-per-rank", 0], ["tokens"]),
        (["--hidden-size", 0], ["--hidden-size must be at least 1, not 0"]),
        (["--bytes-per-element", 0], ["--bytes-per-element must be at least 1, not 0"]),
        (["--num-gpus", 8, 10], ["10 GPUs", "nodes of 4"]),
        (["--num-gpus", "many"], ["many"]),
        (["--gpus-per-node", 0], ["--gpus-per-node must be at least 1, not 0"]),
        (["--expert-model-parallel-size", 0], ["--expert-model-parallel-size must be at least 1, not 0"]),
        (["--expert-model-parallel-size", 1], ["at least 2 ranks"]),
        (["--inter-node-bandwidth", 0], ["--inter-node-bandwidth must be above 0, not 0"]),
        (["--intra-node-bandwidth", -5], ["--intra-node-bandwidth must be above 0, not -5"]),
        (["--inter-node-latency", -1], ["latency"]),
        (["--intra-node-latency", "nan"], ["latency"]),
        (["--seed", -1], ["--seed"]),
        (["--plot", "no/folder/x.png"], ["no/folder/x.png"]),
    ],
)
def test_bad_input(folder, changes, words):
    before = set(folder.iterdir())
    process = run(folder, "--output", "bad.json", *changes)
    assert_bad_input(process, *words)
    assert process.stdout == ""
    assert set(folder.iterdir()) == before


def test_help_has_an_example():
    process = run_tool("simulate_dispatch", "--help")
    assert process.returncode == 0
    assert "example:\n  simulate_dispatch.py --data-path" in process.stdout
