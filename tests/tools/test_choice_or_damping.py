"""The interventions of the study "choice or damping" do what they say."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.results import result
from support.small_moe import make_config, make_mask, make_visible_experts, process_groups

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.statistics import paired_difference
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import HeldOutLoss, read_table, write_table
from maskmoe.launch.machine import Devices
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

sys.path.insert(0, str(ROOT / "tools" / "studies" / "choice_or_damping"))
import analysis
import interventions
from interventions import GatedHashRouter, SecondChoiceRouter, SmearedSelfAttention, UnitWeightRouter

STUDY = ROOT / "tools" / "studies" / "choice_or_damping"
NUM_EXPERTS, IDS, RARE = 4, 12, 5
OWN = torch.arange(IDS) % NUM_EXPERTS  # Hash's experts


@pytest.fixture
def make(monkeypatch, tmp_path, one_rank):
    """Make a router of a class in a run whose mask lets all ids but the first five see every expert."""
    visible = np.ones((1, IDS, NUM_EXPERTS), bool)
    narrow = np.eye(NUM_EXPERTS, dtype=bool)[OWN][None]
    visible[0, :RARE] = narrow[0, :RARE]
    make_mask(narrow).save(tmp_path / interventions.NARROW_MASK)
    monkeypatch.setenv("MASKMOE_RUN_DIR", str(tmp_path))
    config = make_config(NUM_EXPERTS, 1, num_layers=1, moe_router_pre_softmax=True)

    def make(router_class: type[MaskMoERouter]) -> MaskMoERouter:
        mask = make_visible_experts(config, make_mask(visible))
        router = router_class(config, process_groups(), visible_experts=mask)
        router.set_layer_number(1)
        return router

    return make


@pytest.fixture
def batch():
    """Logits and ids of three sequences of four tokens; every id occurs once."""
    ids = TokenIds(torch.arange(IDS).view(4, 3))
    logits = torch.randn(4, 3, NUM_EXPERTS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return logits, ids


def test_gated_hash_has_hashs_expert_and_maskmoes_weight(make, batch):
    logits, ids = batch
    probs, routing_map = make(GatedHashRouter).routing(logits, ids)
    assert torch.equal(routing_map.int().argmax(1), OWN)
    assert (routing_map.sum(1) == 1).all()
    expected = logits.flatten(0, 1).softmax(-1)[torch.arange(IDS), OWN]
    expected = torch.cat([torch.ones(RARE), expected[RARE:]])
    torch.testing.assert_close(probs.sum(1), expected)
    # Rare ids have weight 1 and send no gradient; all others do.
    probs.sum().backward()
    has_gradient = logits.grad.flatten(0, 1).abs().sum(1) > 0
    assert has_gradient.tolist() == [False] * RARE + [True] * (IDS - RARE)


def test_gated_hash_starts_from_bit_equal_outputs(make, batch):
    """With MaskMoE's own choice as the table, gated Hash is MaskMoE: the fixed expert is the only difference."""
    logits, ids = batch
    probs, routing_map = make(MaskMoERouter).routing(logits, ids)
    gated = make(GatedHashRouter)
    gated.own_expert.copy_(routing_map.int().argmax(1))
    for own, expected in zip(gated.routing(logits, ids), (probs, routing_map), strict=True):
        assert torch.equal(own, expected)


def test_unit_weight_keeps_the_choice_and_the_gradient_of_the_logarithm(make, batch):
    logits, ids = batch
    probs, routing_map = make(MaskMoERouter).routing(logits, ids)
    own, own_map = make(UnitWeightRouter).routing(logits, ids)
    assert torch.equal(own_map, routing_map)
    assert torch.equal(own, routing_map.float())
    (expected,) = torch.autograd.grad(probs[routing_map].log().sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(own.sum(), logits)
    torch.testing.assert_close(found, expected)


def test_second_choice_leaves_out_the_best_expert_of_frequent_ids(make, batch):
    logits, ids = batch
    own, own_map = make(SecondChoiceRouter).routing(logits, ids)
    assert own_map[:RARE].int().argmax(1).tolist() == OWN[:RARE].tolist()
    second = logits.flatten(0, 1).topk(2).indices[RARE:, 1]
    assert torch.equal(own_map[RARE:].int().argmax(1), second)
    without_best = logits.flatten(0, 1)[RARE:].topk(NUM_EXPERTS).values[:, 1:].softmax(-1)
    torch.testing.assert_close(own[RARE:].sum(1), without_best[:, 0])


@pytest.mark.parametrize("layer", [1, 2])
def test_keys_of_layer_2_are_mixed_with_the_preceding_ones(monkeypatch, layer):
    query, key, value = (torch.randn(5, 2, 3, 4) for _ in range(3))
    monkeypatch.setattr(interventions.SelfAttention, "__init__", lambda self: torch.nn.Module.__init__(self))
    monkeypatch.setattr(interventions.SelfAttention, "get_query_key_value_tensors", lambda *_: (query, key, value))
    monkeypatch.setattr(interventions.SelfAttention, "layer_number", layer, raising=False)
    monkeypatch.setattr(interventions.SelfAttention, "num_query_groups_per_partition", 3, raising=False)
    attention = SmearedSelfAttention()
    found = attention.get_query_key_value_tensors(SimpleNamespace())
    assert torch.equal(found[0], query)
    assert torch.equal(found[2], value)
    if layer == 1:
        assert torch.equal(found[1], key)
        return
    torch.testing.assert_close(found[1][1:], (key[1:] + key[:-1]) / 2)
    torch.testing.assert_close(found[1][0], key[0])
    with torch.no_grad():
        attention.smear[0] = 100.0
    torch.testing.assert_close(attention.get_query_key_value_tensors(None)[1][:, :, 0], key[:, :, 0])


def test_specs_have_the_replacements():
    for builder, stock, own in (
        (interventions.GatedHashBuilder, MaskMoERouter, GatedHashRouter),
        (interventions.SecondChoiceBuilder, MaskMoERouter, SecondChoiceRouter),
        (interventions.UnitWeightBuilder, MaskMoERouter, UnitWeightRouter),
        (interventions.SmearedKeysBuilder, interventions.SelfAttention, SmearedSelfAttention),
    ):
        assert builder.change(stock) is own
        assert builder.change(int) is int


@pytest.fixture
def table(tmp_path):
    """A table of the blocks of rates, confirmation and mechanism with random losses."""
    random = np.random.default_rng(0)
    results = []
    for suite, variant, seeds in (
        *(("rates", f"{arm}.lr-{rate}", (101, 102)) for arm in ("smoe", "hash") for rate in ("1e-2", "2e-2", "4e-2")),
        *(("confirm", arm, range(1001, 1025)) for arm in ("smoe", "hash", "maskmoe")),
        ("mechanism", "gated-hash", range(1001, 1013)),
    ):
        for seed in seeds:
            losses = [
                HeldOutLoss(text=text, band="all", tokens=tokens, loss=3.6 + random.normal(0, 0.02))
                for text, tokens in (("held-out", 100), ("prose", 1500), ("code", 500))
            ]
            results.append(result(variant, seed, 0).model_copy(update={"suite": suite, "losses": losses}))
    write_table(tmp_path / "results.jsonl", results)
    return tmp_path / "results.jsonl"


def test_analysis_and_the_independent_script_agree(table):
    suites = analysis.outcomes_by_suite(read_table(table))
    for own, baseline in (
        (("confirm", "maskmoe"), ("confirm", "smoe")),
        (("mechanism", "gated-hash"), ("confirm", "maskmoe")),
    ):
        expected = paired_difference(suites[own[0]][own[1]], suites[baseline[0]][baseline[1]])
        found = run_script("check_numbers.py", table, *own, *baseline)
        numbers = dict(word.split("=") for word in found.split())
        assert int(numbers["n"]) == expected.n
        for name in ("mean", "low", "high"):
            assert float(numbers[name]) == pytest.approx(getattr(expected, name), abs=2e-6), name  # six decimals
        # Above 16 pairs the package samples 100,000 flips, whose standard error is below 0.0016.
        assert float(numbers["p"]) == pytest.approx(expected.p, abs=0.006)


def test_analysis_prints_rates_and_differences(table):
    page = run_script("analysis.py", table)
    assert "## rates" in page
    assert "| maskmoe − smoe | 24 |" in page
    assert "| gated-hash − maskmoe | 12 |" in page
    assert "maskmoe-weight-1 − hash | 0 | +nan" not in page


def run_script(name: str, *arguments: object) -> str:
    words = [sys.executable, STUDY / name, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_recorded_runs_are_finished_runs_of_the_suites(tmp_path):
    """The recorded runs trained a GPT model; with other settings, their suites would train them again."""
    table = ROOT / "docs" / "study" / "results.jsonl"
    recorded = read_table(table)
    for name in {run.suite for run in recorded}:
        suite = Suite.read(STUDY / f"{name}.yaml", {})
        data = Dataset.of(suite.data, tmp_path, suite.seq_length)
        finished = Comparison(suite, name, tmp_path, table, data, Devices(0, 1)).results().values()
        runs = {(run.variant, run.seed) for run in recorded if run.suite == name}
        assert runs <= {(run.variant, run.seed) for run in finished}
        assert all("hybrid-layer-pattern" not in variant.flags for variant in suite.variants.values())
