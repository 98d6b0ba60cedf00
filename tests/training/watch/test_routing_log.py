"""The routing log of training equals plain torch, and is equal in every layout."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import read_scalars
from support.training_runs import run_pairs

from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.watch import routing_log, writers
from maskmoe.training.watch.routing_log import RoutingRecord

# Entropies are fp32 sums, whose order depends on the layout. Loads and shares are counts.
FP32_ORDER_OF_SUMS = 2e-5
NAMES = ("expert_load_max_over_mean", "routing_entropy", "single_expert_token_share")
OF_EXPERT_PARALLEL = ("rank_load_max_over_mean", "rank_rows_max")
RECORDED = "recorded routing, experts of one rank, expert parallel 2"


def read_routing(folder: Path) -> dict[str, dict[int, float]]:
    """Return the routing scalars that a run logged, by tag and iteration."""
    tags = re.compile(rf"(moe/)?({'|'.join(NAMES + OF_EXPERT_PARALLEL)})(_layer_\d+)?")
    logged = read_scalars(folder)
    return {tag: {event.step: event.value for event in events} for tag, events in logged.items() if tags.fullmatch(tag)}


def layers_of(routing: dict[str, dict[int, float]], name: str) -> list[int]:
    return sorted(int(tag.rpartition("_")[2]) for tag in routing if tag.startswith(f"moe/{name}_layer_"))


@pytest.mark.runs(RECORDED)
def test_follows_the_method(runs, workplace):
    """The run plans its dispatch on two ranks, logs every second iteration, and evaluates in between."""
    (run,) = runs
    logged = read_routing(run.folder)
    mask = RoutingMask.load(workplace.folder / "rank_local.safetensors")
    for iteration in (2, 4):
        ranks = [torch.load(run.folder / f"routed{iteration}_{rank}.pt") for rank in range(2)]
        means = dict.fromkeys((*NAMES, *OF_EXPERT_PARALLEL), 0.0)
        for layer in range(4):
            load, rows = np.zeros(8), []
            entropies, num_tokens = [], 0
            for micro_batches in (rank[layer + 1] for rank in ranks):
                assert len(micro_batches) == 2 * 2
                for ids, logits in micro_batches:
                    visible = torch.from_numpy(mask.visible_sets(layer)[ids])
                    masked = logits.masked_fill(~visible, -torch.inf)
                    kth_best = masked.topk(3).values[:, -1:]
                    selected = visible & (masked >= kth_best)
                    load += selected.sum(dim=0).numpy()
                    rows.append(int(selected.sum()))
                    num_tokens += len(ids)
                    for p in masked[visible.sum(dim=1) > 1].softmax(dim=1):
                        entropies.append(-(p[p > 0] * p[p > 0].log()).sum().item())
            assert num_tokens == 2 * 8 * 32  # all tokens of two batches
            expected = {
                "expert_load_max_over_mean": load.max() / load.mean(),
                "routing_entropy": np.mean(entropies),
                "single_expert_token_share": 1 - len(entropies) / num_tokens,
                "rank_load_max_over_mean": max(load[:4].sum(), load[4:].sum()) / (load.sum() / 2),
                "rank_rows_max": max(rows),
            }
            for name, value in expected.items():
                assert logged[f"moe/{name}_layer_{layer}"][iteration] == pytest.approx(value, rel=1e-6), name
                means[name] = max(means[name], value) if name == "rank_rows_max" else means[name] + value / 4
        assert means == {name: pytest.approx(logged[name][iteration], rel=1e-6) for name in means}
    assert list(logged["routing_entropy"]) == [2, 4]
    lines = re.findall(r"^ routing \| expert load max over mean: (\S+) \|", (run.folder / "out1.log").read_text(), re.M)
    assert [float(value) for value in lines] == pytest.approx(
        list(logged["expert_load_max_over_mean"].values()), rel=1e-3
    )


@pytest.mark.runs(RECORDED)
def test_losses_of_layers_are_megatrons(runs):
    """`--moe-per-layer-logging` logs the losses of a layer under the index that the routing log uses."""
    (run,) = runs
    logged = read_scalars(run.folder)
    for name in ("load_balancing_loss", "z_loss"):
        of_layers = [[event.value for event in logged[f"moe/{name}_layer_{layer}"]] for layer in range(4)]
        assert np.mean(of_layers, axis=0) == pytest.approx([event.value for event in logged[name]], rel=1e-6)
        assert len(set(map(tuple, of_layers))) == 4


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
    routing_log._write(RoutingRecord({"routing_entropy": {0: 0.5, 2: 1.0}}, tokens_per_expert={}), 10)
    expected = {"routing_entropy": 0.75, "moe/routing_entropy_layer_0": 0.5, "moe/routing_entropy_layer_2": 1.0}
    assert tensorboard.scalars == wandb.scalars == {(tag, 10): value for tag, value in expected.items()}
