"""Runs `maskmoe simulate` as a user does."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from support.command_lines import Outcome, run_command, writing_nothing
from support.datasets import write_documents
from support.small_cases import VOCAB_SIZE, count, make_mask, write_data

from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.routing_mask.mask import RoutingMask


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a dataset, a dataset with an id that is not in the mask, and a mask of two layers."""
    folder = tmp_path_factory.mktemp("tool")
    make_mask(count(write_data(folder)), num_experts=32, frequent_visible=4, num_layers=2).save(
        folder / "mask.safetensors"
    )
    write_documents(folder / "foreign", [range(VOCAB_SIZE + 1)])
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def run(*changes: object) -> Outcome:
    """Run on a small case; `changes` are further flags, which override the flags of the case."""
    lists = {"--data-path": ["text"], "--topk": [2], "--num-gpus": [16, 8, 64]}
    case = [word for flag, values in lists.items() if flag not in changes for word in (flag, *values)]
    case += ["--routing-mask", "mask.safetensors", "--hidden-size", 64, "--tokens-per-rank", 50, "--gpus-per-node", 4]
    return run_command("simulate", *case, *changes)


def test_outputs(folder):
    outcome = run("--topk", 2, 4, "--output", "costs.csv", "--plot", "plot.png", "--layer", 2)
    assert outcome.code == 0, outcome.errors
    assert "top-2" in outcome.output
    assert "top-4" in outcome.output
    assert "impossible: 32 experts cannot be divided evenly over 64 expert-parallel ranks" in outcome.output
    assert outcome.output.endswith("written          costs.csv\nwritten          plot.png\n")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "costs.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    cases = [(row["topk"], row["num_gpus"]) for row in rows]
    assert cases == [(k, gpus) for k in "24" for gpus in ("8", "16", "64") for variant in range(6)]
    for row in rows:
        assert (row["impossible"] == "") != (row["seconds"] == "")
        if row["variant"] == "rank-local mask, planned" and row["num_gpus"] == "8":
            assert row["rows"] == "50"


def test_plot_without_a_possible_variant(folder):
    assert run("--num-gpus", 64, 128, "--plot", "nothing.png").code == 0
    assert (folder / "nothing.png").exists()


def test_same_seed_same_results():
    first, second, other = (run("--seed", seed).output for seed in (3, 3, 4))
    assert first == second != other


def test_dataset_of_another_tokenizer_with_as_many_ids(folder):
    of_mask, of_dataset = (TokenizerRecord("HuggingFaceTokenizer", f"{x}.json", x * 64, VOCAB_SIZE, 0) for x in "ab")
    write_documents(folder / "other", [range(VOCAB_SIZE)], tokenizer=of_dataset)
    mask = RoutingMask.load(folder / "mask.safetensors")
    replace(mask, provenance=replace(mask.provenance, tokenizer=of_mask)).save(folder / "of_a.safetensors")
    outcome = run("--data-path", "other", "--routing-mask", "of_a.safetensors")
    outcome.assert_refused("of_a.safetensors", "the counts were made with HuggingFaceTokenizer b.json")


def test_id_that_is_not_in_the_mask(folder):
    with writing_nothing(folder):
        outcome = run("--output", "bad.csv", "--data-path", "foreign")
    outcome.assert_refused("mask.safetensors", "100 ids", "token 100 has id 100")
    assert outcome.output == ""
