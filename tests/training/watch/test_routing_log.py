"""The routing log of training equals plain torch, and is equal in every layout."""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import read_scalars
from support.small_moe import make_config, make_mask, make_router, random_visible_sets
from support.training_runs import run_pairs

from maskmoe.training.watch import routing_log, writers
from maskmoe.training.watch.routing_log import RoutingRecord
from maskmoe.transformer.token_ids import TokenIds

# Entropies are fp32 sums, whose order depends on the layout. Loads and shares are counts.
FP32_ORDER_OF_SUMS = 2e-5
NAMES = ("expert_load_max_over_mean", "routing_entropy", "single_expert_token_share")
OF_EXPERT_PARALLEL = ("rank_load_max_over_mean", "rank_rows_max")
LOGGED = "experts of one rank, expert parallel 2, logged seldom"


def read_routing(folder: Path) -> dict[str, dict[int, float]]:
    """Return the routing scalars that a run logged, by tag and iteration."""
    tags = re.compile(rf"(moe/)?({'|'.join(NAMES + OF_EXPERT_PARALLEL)})(_layer_\d+)?")
    logged = read_scalars(folder)
    return {tag: {event.step: event.value for event in events} for tag, events in logged.items() if tags.fullmatch(tag)}


def layers_of(routing: dict[str, dict[int, float]], name: str) -> list[int]:
    return sorted(int(tag.rpartition("_")[2]) for tag in routing if tag.startswith(f"moe/{name}_layer_"))


def test_values_follow_the_counts_of_the_routers(one_rank, monkeypatch) -> None:
    """Two micro-batches, in which every token selects up to 3 of 8 experts; two ranks would have 4 experts each."""
    config, mask = make_config(8, 3, num_layers=2), make_mask(random_visible_sets(0, 2, 20, 8))
    chunk = torch.nn.ModuleList([make_router(config, mask, layer_number=layer) for layer in (1, 2)])
    chunk.config = replace(config, expert_model_parallel_size=2)
    args = Namespace(num_layers=2, moe_layer_freq=1, num_experts=8, mtp_num_layers=None)
    monkeypatch.setattr(routing_log, "get_args", lambda: args)
    generator, expected = torch.Generator().manual_seed(0), {}
    for layer, router in enumerate(chunk):
        load, entropies, num_tokens, rows = torch.zeros(8), [], 0, []
        for _ in range(2):
            ids, logits = torch.randint(20, (6, 2), generator=generator), torch.randn(6, 2, 8, generator=generator)
            _, selected = router.routing(logits, TokenIds(ids))
            visible = torch.from_numpy(mask.visible_sets(layer)[ids.flatten()])
            masked = logits.flatten(0, 1).double().masked_fill(~visible, -torch.inf)
            assert torch.equal(selected, visible & (masked >= masked.topk(3).values[:, -1:]))
            load += selected.sum(dim=0)
            rows.append(int(selected.sum()))
            router.statistics.count_rows(rows[-1])
            num_tokens += ids.numel()
            for p in masked[visible.sum(dim=1) > 1].softmax(dim=1):
                entropies.append(-(p[p > 0] * p[p > 0].log()).sum().item())
        expected[layer] = {
            "expert_load_max_over_mean": (load.max() / load.mean()).item(),
            "routing_entropy": np.mean(entropies),
            "single_expert_token_share": 1 - len(entropies) / num_tokens,
            "rank_load_max_over_mean": (max(load[:4].sum(), load[4:].sum()) / (load.sum() / 2)).item(),
            "rank_rows_max": max(rows),
        }
    values = routing_log.take_record([chunk]).by_layer
    assert values.keys() == expected[0].keys()
    for name in values:
        assert values[name] == pytest.approx({layer: expected[layer][name] for layer in expected})


@pytest.mark.runs(LOGGED)
def test_losses_of_layers_are_megatrons(runs):
    """`--moe-per-layer-logging` logs the losses of a layer under the index that the routing log uses."""
    (run,) = runs
    logged = read_scalars(run.folder)
    for name in ("load_balancing_loss", "z_loss"):
        of_layers = [[event.value for event in logged[f"moe/{name}_layer_{layer}"]] for layer in range(4)]
        assert np.mean(of_layers, axis=0) == pytest.approx([event.value for event in logged[name]], rel=1e-6)
        assert len(set(map(tuple, of_layers))) == 4
    loads = read_routing(run.folder)["expert_load_max_over_mean"]
    assert list(loads) == [2, 4]
    lines = re.findall(r"^ routing \| expert load max over mean: (\S+) \|", (run.folder / "out1.log").read_text(), re.M)
    assert [float(value) for value in lines] == pytest.approx(list(loads.values()), rel=1e-3)


@pytest.mark.parametrize(
    "layouts",
    run_pairs(
        ("reference", "expert parallel 2"),
        ("reference", "interleaved pipeline"),
        ("reference", "data parallel 2, distributed optimizer"),
        ("rich", "rich, tensor 2, expert parallel 2"),
        ("rich", "rich, pipeline 2"),
        ("rich", "rich, context parallel 2, expert parallel 2"),
        ("experts of one rank", "experts of one rank, selective recompute"),
    ),
)
def test_layout_agrees_with_single_process(runs, layouts):
    reference, run = (read_routing(outcome.folder) for outcome in runs)
    assert set(run) - set(reference) == {tag for tag in run if "rank_" in tag}
    assert bool(set(run) - set(reference)) == ("expert parallel 2" in layouts[1] or "selective" in layouts[1])
    for tag in reference:
        for iteration, value in run[tag].items():
            assert value == pytest.approx(reference[tag][iteration], rel=FP32_ORDER_OF_SUMS), (tag, iteration)


@pytest.mark.parametrize(
    "pair",
    run_pairs(("rich", "rich, resumed"), slow=(("reference", "full recompute"), ("reference", "selective recompute"))),
)
def test_recomputation_and_resume_are_bit_equal(runs, pair):
    reference, run = (read_routing(outcome.folder) for outcome in runs)
    assert set(run) == set(reference)
    assert run == {tag: {step: reference[tag][step] for step in values} for tag, values in run.items()}


@pytest.mark.runs("rich")
def test_layers_with_experts_have_curves(runs):
    """The second of four layers has no experts. The layer of multi-token prediction comes last."""
    routing = read_routing(runs[0].folder)
    for name in NAMES:
        assert layers_of(routing, name) == [0, 2, 3, 4]


@pytest.mark.runs("second rank without tokens")
def test_rank_without_tokens(runs):
    """Every token has one visible expert, which is on the first rank."""
    (run,) = runs
    routing = read_routing(run.folder)
    assert set(routing["rank_load_max_over_mean"].values()) == {2.0}
    assert set(routing["rank_rows_max"].values()) == {2 * 32 * 2}
    assert set(routing["single_expert_token_share"].values()) == {1.0}
    assert "routing_entropy" not in routing


def test_scalars_go_to_both_writers(monkeypatch):
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.log({tag: value}, step)

        def log(self, values, step):
            self.scalars |= {(tag, step): value for tag, value in values.items()}

    tensorboard, wandb = Writer(), Writer()
    monkeypatch.setattr(writers, "get_tensorboard_writer", lambda: tensorboard)
    monkeypatch.setattr(writers, "get_wandb_writer", lambda: wandb)
    by_layer = {"routing_entropy": {0: 0.5, 2: 1.0}, "rank_rows_max": {0: 7, 2: 3}}
    routing_log._write(RoutingRecord(by_layer, tokens_per_expert={}), 10)
    expected = {"routing_entropy": 0.75, "moe/routing_entropy_layer_0": 0.5, "moe/routing_entropy_layer_2": 1.0}
    expected |= {"rank_rows_max": 7, "moe/rank_rows_max_layer_0": 7, "moe/rank_rows_max_layer_2": 3}
    assert tensorboard.scalars == wandb.scalars == {(tag, 10): value for tag, value in expected.items()}
