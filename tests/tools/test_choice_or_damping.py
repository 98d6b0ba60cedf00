"""The study "choice or damping": interventions, suites, measures, and the numbers of the page."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from support.command_lines import run_command
from support.paths import ROOT
from support.results import result
from support.small_moe import make_config, make_mask, make_visible_experts, process_groups

from maskmoe.command_line.compare import open_comparison, parse_arguments
from maskmoe.comparison.table import HeldOutLoss, RunResult, read_table, write_table
from maskmoe.errors import UserError
from maskmoe.training.model.model_builder import MaskMoEGPTModelBuilder
from maskmoe.transformer.models import MaskMoEGPTModel
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

sys.path.insert(0, str(ROOT / "tools" / "studies" / "choice_or_damping"))
import analysis
import check_numbers
import interventions
import measures
import page as study_page
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


def test_models_have_the_replacements_and_equal_initial_weights(monkeypatch, tmp_path, one_rank):
    """The modules of whole models, and what a checkpoint holds of them: gated Hash is evaluated with its experts."""
    narrow = np.eye(NUM_EXPERTS, dtype=bool)[[OWN.tolist(), OWN.flip(0).tolist()]]
    visible = narrow.copy()
    visible[:, RARE:] = True
    make_mask(narrow).save(tmp_path / interventions.NARROW_MASK)
    monkeypatch.setenv("MASKMOE_RUN_DIR", str(tmp_path))
    config = make_config(NUM_EXPERTS, 1, num_layers=2, moe_router_pre_softmax=True)
    megatron = SimpleNamespace(scatter_embedding_sequence_parallel=True)
    settings = SimpleNamespace(
        transformer=config, megatron=megatron, aux_loss_tokens="all", qk_layernorm_all_heads=False
    )

    def build(builder: type[MaskMoEGPTModelBuilder]) -> MaskMoEGPTModel:
        torch.manual_seed(0)
        mask = make_visible_experts(config, make_mask(visible))
        spec = builder(settings).layer_specs(mask, None)["transformer_layer_spec"]
        return MaskMoEGPTModel(config, spec, visible_experts=mask, vocab_size=IDS, max_sequence_length=4)

    stock = dict(build(MaskMoEGPTModelBuilder).named_parameters())
    for builder, own, in_checkpoint in (
        (interventions.GatedHashBuilder, GatedHashRouter, "mlp.router.own_expert"),
        (interventions.SecondChoiceBuilder, SecondChoiceRouter, None),
        (interventions.UnitWeightBuilder, UnitWeightRouter, None),
        (interventions.SmearedKeysBuilder, SmearedSelfAttention, "self_attention.smear"),
    ):
        model = build(builder)
        assert sum(isinstance(module, own) for module in model.modules()) == 2
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], weight) for name, weight in stock.items())
        if in_checkpoint:
            assert all(f"decoder.layers.{layer}.{in_checkpoint}" in model.sharded_state_dict() for layer in (0, 1))
        if own is GatedHashRouter:
            routers = [layer.mlp.router for layer in model.decoder.layers]
            assert [router.own_expert.tolist() for router in routers] == narrow.argmax(-1).tolist()


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


def test_pages_of_the_repository_have_the_numbers_of_its_tables():
    study = ROOT / "docs" / "study"
    page = (study / "choice-or-damping.md").read_text()
    assert [*check_numbers.differing(page, check_numbers.Tables(study / "results.jsonl"))] == []
    # Each row of the README is a row of the page, with fewer columns.
    rows = {cells[0]: cells for line in page.splitlines() if len(cells := re.split(r" *\| *", line.strip("| "))) > 9}
    results = (ROOT / "README.md").read_text().partition("## Results")[2].partition("##")[0]
    shown = [re.split(r" *\| *", line.strip("| ")) for line in results.splitlines() if line.startswith("| MaskMoE −")]
    assert len(shown) == 6
    for label, *numbers in shown:
        own = rows[label.replace(", 32 experts, 4,096 ids", ", 9 M tokens, N = 32")]
        assert numbers == [own[2], own[5], own[6]]


def test_a_part_of_the_runs_has_no_page_and_no_look_at_block_b(write, results, tmp_path):
    some = [each for each in results if each.suite != "experts" and (each.suite, each.seed) != ("confirm", 1024)]
    (write(some).with_name("measures.jsonl")).unlink()
    outcome = run_script("page.py", tmp_path / "results.jsonl")
    assert outcome.returncode == 2
    missing = "3 of 72 runs of confirm; 24 of 24 runs of experts; the measures of smoe; the measures of maskmoe."
    assert missing in outcome.stdout
    assert not (tmp_path / "choice-or-damping.md").exists()
    printed = run_script("analysis.py", tmp_path / "results.jsonl").stdout
    assert "| maskmoe − smoe | 8 |" in printed
    assert "| maskmoe-smeared − hash-smeared | 12 |" in printed
    assert "| maskmoe − smoe | 2" not in printed
    assert "gated-hash −" not in printed


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        ({}, ["is not shown to beat both", "Hash's (not resolved)", "no lead of MaskMoE over Hash"]),
        ({"maskmoe": 0.1}, ["is not shown to beat both", "Hash's (worse)", "no lead of MaskMoE over Hash"]),
        ({"maskmoe": -0.1, "smoe": -0.1}, ["is not shown to beat both", "Hash's (better)"]),
        ({"maskmoe": -0.1}, ["beats both", "SMoE's (better)"]),
    ],
)
def test_page_answers_the_question(write, results, changes, answers):
    shifted = []
    for each in results:
        change = changes.get(each.variant, 0) if each.suite == "confirm" else 0
        losses = [loss.model_copy(update={"loss": loss.loss + change}) for loss in each.losses]
        shifted.append(each.model_copy(update={"losses": losses}))
    table = write(shifted)
    page = study_page.render(analysis.Study.read(table), measures.read_measures(table.with_name("measures.jsonl")))
    text = " ".join(page.split())
    assert [each for each in answers if each not in text] == []
    assert ("no lead of" in text) == any("no lead" in each for each in answers)
    tables = check_numbers.Tables(table)
    assert [*check_numbers.differing(page, tables)] == []
    for one, other in (("beats both", "is not shown to beat both"), ("(better)", "(not resolved)")):
        for right, wrong in ((one, other), (other, one)):
            assert [*check_numbers.differing(page.replace(right, wrong), tables)] or right not in page
    # Each sentence has the numbers of its own rows.
    for length in (r"9\smillion", r"36\smillion", r"32\sexperts"):
        before, paragraph, after = page.partition(re.search(rf"{length}.*?\n\n", page, re.DOTALL)[0])
        first, second = re.findall(r"\d\.\d{3}\s±\s\d\.\d{3}", paragraph)[:2]
        swapped = paragraph.replace(first, "?", 1).replace(second, first, 1).replace("?", second, 1)
        assert any("does not say" in each for each in check_numbers.differing(before + swapped + after, tables))


def test_runs_without_hashs_experts_are_noticed(write, results):
    """Gated Hash gives each expert as many tokens as Hash with the same seed."""
    changed = [
        each.model_copy(update={"load": [[1, 2]]}) if (each.variant, each.seed) == ("gated-hash", 1001) else each
        for each in results
    ]
    tables = check_numbers.Tables(write(changed))
    assert [*check_numbers.other_experts(tables)] == ["gated-hash with seed 1001 does not have Hash's experts"]


def test_results_with_other_rates_than_the_suites_are_refused(write, results):
    stale = results[-1].model_copy(update={"settings": {"lr": "3e-3"}})
    with pytest.raises(UserError, match=r"maskmoe of experts with seed 1008 has the rate 3e-3, but the suite has 1e-2"):
        analysis.Study.read(write([*results, stale]))


def test_analysis_prints_rates_and_differences(write, results):
    page = run_script("analysis.py", write(results)).stdout
    assert "| smoe | 1e-2 | 6 |" in page
    assert "| maskmoe − smoe | 24 |" in page
    assert "| gated-hash − maskmoe | 24 |" in page


def test_suites_have_the_plans_runs_and_the_rates_of_the_arms():
    planned = {suite: analysis.variants_of(suite) for suite in ("rates", *analysis.CONTRASTS)}
    runs = {suite: sum(len(variant.seeds) for variant in of.values()) for suite, of in planned.items()}
    grid = yaml.safe_load((STUDY / "rates.yaml").read_text())["vary"]["lr"]  # block A may add rates at its ends
    assert runs == {"rates": 18 * len(grid), "confirm": 72, "mechanism": 96, "long": 24, "experts": 24}
    rates = {arm: variant.flags["lr"][0] for arm, variant in planned["confirm"].items()}
    assert [*analysis.stale_rates(rates)] == []
    others = dict.fromkeys(rates, "8e-2")
    stale = [*analysis.stale_rates(others)]
    assert len(stale) == 3 + 6 + 3 + 3
    assert "- maskmoe of long.yaml has the rate 2.5e-3: change it to 0.02" in stale


def test_recorded_runs_have_the_settings_of_the_suites():
    """A change of a suite that would repeat recorded runs is noticed."""
    recorded = read_table(ROOT / "docs" / "study" / "results.jsonl")
    for suite in dict.fromkeys(each.suite for each in recorded):
        assert len({json.dumps(each.text, sort_keys=True) for each in recorded if each.suite == suite}) == 1
        options = parse_arguments([str(STUDY / f"{suite}.yaml"), "--table", str(ROOT / "docs/study/results.jsonl")])
        assert len(open_comparison(options).results()) == sum(each.suite == suite for each in recorded)


def test_tokens_change_until_their_last_other_expert():
    """Four checkpoints of one layer: one token never changes, one comes back, one changes at the end."""
    experts = np.array([[0, 1, 2], [0, 3, 2], [0, 1, 2], [0, 1, 3]], np.int16)[:, None]
    assert measures.shares_changing(experts).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])


@pytest.mark.slow
def test_trained_runs_are_measured(tmp_path):
    """The smallest suite from text to a line for each run; a second call measures nothing again."""
    words = [f"word{number}" for number in range(60)]
    with (tmp_path / "text.jsonl").open("w") as stream:
        for document in range(400):
            text = " ".join(words[(document * 7 + i * i) % 59] for i in range(60))
            stream.write(json.dumps({"text": text}) + "\n")
    arms = yaml.safe_load((STUDY / "arms.yaml").read_text())
    arms["flags"] |= {"train-iters": 8, "eval-interval": 4, "eval-iters": 1, "save-interval": 2, "micro-batch-size": 2}
    arms["flags"] |= {"keep-last-checkpoints": 4, "global-batch-size": 2, "log-interval": 2}
    arms["data"] = {"vocab-size": 280, "input": "text.jsonl", "held-out": {"prose": "text.jsonl"}}
    arms["baselines"], _ = [], arms["variants"].pop("smoe")
    arms["variants"]["maskmoe"]["mask"]["program"] = str(STUDY / "widened_mask.py")
    (tmp_path / "confirm.yaml").write_text(yaml.safe_dump(arms))
    options = (tmp_path / "confirm.yaml", "--run-dir", tmp_path / "run")
    outcome = run_command("compare", *options)
    assert outcome.code == 0, outcome.errors
    for _ in range(2):
        outcome = run_script("measures.py", *options)
        assert outcome.returncode == 0, outcome.stdout
    found = {each.variant: each for each in measures.read_measures(tmp_path / "run" / "measures.jsonl")}
    losses = {each.variant: each.losses for each in read_table(tmp_path / "run" / "results.jsonl")}
    # Hash has nothing to choose, and never changes.
    prose = [each for each in losses["hash"] if each.text == "prose"]
    assert found["hash"].losses == prose
    assert found["hash"].changing == [(step, 0, 0) for step in (2, 4, 6, 8)]
    # In MaskMoE only frequent ids can change.
    assert found["maskmoe"].losses != [each for each in losses["maskmoe"] if each.text == "prose"]
    (_, all_tokens, frequent), *_ = found["maskmoe"].changing
    assert 0 < all_tokens < frequent
    assert not (tmp_path / "run" / "runs" / "maskmoe.seed-1" / "measures").exists()


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, STUDY / name, *map(str, arguments)]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
