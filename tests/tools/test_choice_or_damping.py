"""The study "choice or damping": interventions, suites, measures, and the numbers of the page."""

import lzma
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.small_moe import make_config, make_mask, make_visible_experts, process_groups
from support.suites import result

from maskmoe.comparison.table import HeldOutLoss, RunResult, write_table
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

sys.path.insert(0, str(ROOT / "tools" / "studies" / "choice_or_damping"))
import analysis
import check_numbers
import interventions
import measures
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


BANDS = {"all": 1_000_000, "top 40 %": 400_000, "next 50 %": 500_000, "last 10 %": 100_000}


@pytest.fixture
def results():
    """Results of all planned runs with random losses."""
    random = np.random.default_rng(0)
    return [
        result(name, seed, 0, {"lr": variant.flags["lr"][0]}).model_copy(
            update={"suite": suite, "losses": [*random_losses(random)]}
        )
        for suite in ("rates", *analysis.CONTRASTS)
        for name, variant in analysis.variants_of(suite).items()
        for seed in variant.seeds
    ]


def random_losses(random: np.random.Generator) -> Iterator[HeldOutLoss]:
    for text, share in (("held-out", 0.1), ("prose", 1), ("code", 1.2)):
        for band, tokens in BANDS.items():
            yield HeldOutLoss(text=text, band=band, tokens=int(tokens * share), loss=3.6 + random.normal(0, 0.02))


@pytest.fixture
def write(tmp_path):
    """Write the tables of results and measures, and return the path of the table of results."""

    def write(results: Sequence[RunResult]) -> Path:
        random = np.random.default_rng(1)
        measured = [
            measures.Measures(
                suite=each.suite,
                variant=each.variant,
                seed=each.seed,
                losses=[*random_losses(random)],
                changing=[(221 * number, random.random(), random.random()) for number in range(1, 11)],
            )
            for each in results
            if (each.suite, each.variant) in (("confirm", "smoe"), ("confirm", "maskmoe"))
        ]
        write_table(tmp_path / "results.jsonl", results)
        measures.write_measures(tmp_path / "measures.jsonl", measured)
        return tmp_path / "results.jsonl"

    return write


def test_independent_script_finds_the_numbers_of_the_page(write, results, tmp_path):
    table, page = write(results), tmp_path / "choice-or-damping.md"
    assert run_script("page.py", table).stdout.strip() == ""
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    outcome = run_script("check_numbers.py", table, page)
    assert outcome.returncode == 0, outcome.stdout
    # Every number of a row is compared, in each kind of table, and numbers of the prose with the tables.
    tables = check_numbers.Tables(table)
    for label in ("Hash, 9 M tokens", "MaskMoE − Hash, 36 M tokens", "Gated Hash − Hash", "SMoE, all"):
        row = re.search(rf"^\| {label} .*$", text, re.MULTILINE)[0]
        values = row.removeprefix(f"| {label}")
        for number in (r"(\| +[+−<]?)[\d.]+", r"( ± )[\d.]+"):
            changed, count = re.subn(number, r"\g<1>99", values)
            found = [*check_numbers.differing(text.replace(row, f"| {label}{changed}"), tables)]
            assert sum(f": {label}: the page has " in each for each in found) == count
    page.write_text(text.replace("## The question", "0.777"))
    outcome = run_script("check_numbers.py", table, page)
    assert outcome.returncode == 1
    assert outcome.stdout.startswith("0.777 of the prose is in no table\n")


def test_pages_of_the_repository_have_the_numbers_of_its_tables(tmp_path):
    page = (ROOT / "docs" / "study" / "choice-or-damping.md").read_text()
    for name in ("results.jsonl", "measures.jsonl"):
        (tmp_path / name).write_bytes(lzma.decompress((STUDY / "data" / f"{name}.xz").read_bytes()))
    assert [*check_numbers.differing(page, check_numbers.Tables(tmp_path / "results.jsonl"))] == []
    # Each row of the README is a row of the page, with fewer columns.
    rows = {cells[0]: cells for line in page.splitlines() if len(cells := re.split(r" *\| *", line.strip("| "))) > 9}
    results = (ROOT / "README.md").read_text().partition("## Results")[2].partition("##")[0]
    shown = [re.split(r" *\| *", line.strip("| ")) for line in results.splitlines() if line.startswith("| MaskMoE −")]
    assert len(shown) == 6
    for label, *numbers in shown:
        own = rows[label.replace(", 32 experts, 4,096 ids", ", 9 M tokens, N = 32")]
        assert numbers == [own[2], own[5], own[6]]


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, STUDY / name, *map(str, arguments)]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
