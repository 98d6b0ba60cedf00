"""The commands that count ids and build masks, as a user runs them."""

import sys
from pathlib import Path

import numpy as np
import pytest
from support.command_lines import Outcome, run_command
from support.datasets import write_documents

from maskmoe.command_line.build_routing_mask import parse_arguments, recipe_from
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import build_routing_mask
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

VOCAB_SIZE = 300


def count(*arguments, cwd: Path, output: str = "counts.safetensors") -> Outcome:
    return run_command("count", *arguments, "--output", output, folder=cwd)


def build(*arguments, cwd: Path, output: str = "mask.safetensors") -> Outcome:
    return run_command("mask", *arguments, "--output", output, folder=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two datasets and counts of the first; the second has another tokenizer and an unknown id."""
    folder = tmp_path_factory.mktemp("tools")
    rng = np.random.default_rng(0)
    probabilities = 1 / np.arange(1, VOCAB_SIZE + 1)
    ids = rng.choice(VOCAB_SIZE, size=5000, p=probabilities / probabilities.sum())
    for name, sha256, tail in (("text", "a", [5]), ("other", "b", [VOCAB_SIZE])):
        record = TokenizerRecord("HuggingFaceTokenizer", f"{name}.json", sha256 * 64, VOCAB_SIZE, eod_id=0)
        write_documents(folder / name, [[*ids, *tail]], tokenizer=record)
    counted = count("--data-path", "text", "--vocab-size", VOCAB_SIZE, cwd=folder)
    assert counted.code == 0, counted.errors
    return folder


def test_count(folder):
    process = count(
        "--data-path", "text", "--vocab-size", VOCAB_SIZE, "--workers", 2, cwd=folder, output="again.safetensors"
    )
    assert process.code == 0
    frequency = TokenFrequency.load(folder / "again.safetensors")
    assert frequency.num_tokens == 5001
    assert frequency.tokenizer.model == "text.json"
    assert "tokens           5,001" in process.output
    most_frequent = np.argmax(frequency.counts[0])
    assert f"most frequent    {most_frequent} (" in process.output
    assert f"ids never seen   {(frequency.counts == 0).sum()} of 300" in process.output
    assert frequency.digest in process.output


METHOD = ["--frequent-mass", 0.5, "--frequent-visible-experts", 2, "--seed", 3]
MODEL = ["--num-experts", 8, "--num-layers", 3]
COUNTS = ["--token-frequency", "counts.safetensors"]


def test_build(folder):
    rank_local = ["--assignment", "rank-local", "--expert-model-parallel-size", 2, "--moe-router-topk", 3]
    process = build(*COUNTS, *MODEL, *METHOD, *rank_local, cwd=folder)
    assert process.code == 0, process.errors
    mask = RoutingMask.load(folder / "mask.safetensors")
    mask.check_fits(
        vocab_size=VOCAB_SIZE, num_experts=8, layers=FeedForwardLayers((True,) * 3), expert_model_parallel_size=2
    )
    provenance = mask.provenance
    settings = (provenance.assignment, provenance.frequent_mass, provenance.seed, provenance.topk)
    assert settings == ("rank-local", 0.5, 3, 3)
    assert provenance.counts_digest == TokenFrequency.load(folder / "counts.safetensors").digest
    assert provenance.tokenizer.model == "text.json"
    for line in (
        "frequent share   5",
        "ids see 2 of 8 experts; every other id sees 1 expert",
        "over tables) at top-3\n",
        "rank load ",
        mask.digest,
    ):
        assert line in process.output
    again = build(*COUNTS, *MODEL, *METHOD, *rank_local, cwd=folder, output="again.mask")
    assert again.code == 0
    assert (folder / "again.mask").read_bytes() == (folder / "mask.safetensors").read_bytes()
    shared = build(*COUNTS, *MODEL, *METHOD, *rank_local, "--shared-table", cwd=folder, output="shared.mask")
    assert "one table for all layers" in shared.output
    assert RoutingMask.load(folder / "shared.mask").is_shared


def test_build_hash_layers(folder):
    """The first layers are hash layers, balanced by default; a rank-local mask makes them rank-local."""
    deepseek = ["--preset", "smoe", "--hash-layers", 2, "--hash-visible-experts", 3]
    rank_local = ["--assignment", "rank-local", "--expert-model-parallel-size", 2, "--hash-layers", 1]
    for flags, num_visible, assignment in (
        ([*COUNTS, *deepseek], [{3}, {3}, {8}], "balanced"),
        ([*COUNTS, *METHOD, *rank_local], [{1}, {1, 2}, {1, 2}], "rank-local"),
    ):
        process = build(*flags, *MODEL, "--force", cwd=folder, output="hash_layers.safetensors")
        assert process.code == 0, process.errors
        mask = RoutingMask.load(folder / "hash_layers.safetensors")
        assert [set(mask.num_visible_of_layer(layer)) for layer in range(3)] == num_visible
        assert mask.provenance.hash_layers.assignment == assignment
        first = mask.provenance.hash_layers.num_layers
        layers = f"the first {first} layers" if first > 1 else "the first layer"
        experts = f"{max(num_visible[0])} of 8 experts"
        assert f"visible experts  in {layers}, every id sees {experts}; after that, " in process.output
        # One id has 16 % of the occurrences, too many for the one expert that it sees in a hash layer.
        assert ("WARNING: balance is impossible" in process.output) == (assignment == "rank-local")


def built_in_process(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: object) -> RoutingMask:
    """Return the mask of the command line, without a new process and without a file."""
    monkeypatch.setattr(sys, "argv", ["mask", *map(str, (*COUNTS, *MODEL, *flags, "--output", "unused"))])
    frequency = TokenFrequency.load(folder / "counts.safetensors")
    return build_routing_mask(recipe_from(parse_arguments()), frequency=frequency, workers=1)


def test_without_hash_layers_the_mask_is_that_of_the_other_flags(folder, monkeypatch):
    masks = [built_in_process(folder, monkeypatch, "--preset", "smoe", *more) for more in ([], ["--hash-layers", 0])]
    assert masks[0].digest == masks[1].digest
    with pytest.raises(UserError, match="1 to 2 of 3 layers can be hash layers, not 3"):
        built_in_process(folder, monkeypatch, "--preset", "smoe", "--hash-layers", 3)


def test_build_warns_of_an_id_that_makes_balance_impossible(folder):
    occurrences = TokenFrequency.load(folder / "counts.safetensors").occurrences
    worst = int(np.argmax(occurrences))
    process = build(*COUNTS, *MODEL, "--preset", "hash-balanced", cwd=folder, output="hash.safetensors")
    assert process.code == 0
    share = f"{occurrences[worst] / occurrences.sum():.2%}"
    assert f"WARNING: balance is impossible: id {worst} alone has {share} of the load and sees 1 of 8" in process.output
    fine = build(*COUNTS, *MODEL, *METHOD, "--assignment", "balanced", cwd=folder, output="fine.safetensors")
    assert fine.code == 0, fine.errors
    assert "WARNING" not in fine.output
