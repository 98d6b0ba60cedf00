"""The routing log of training equals plain torch, and is equal in every layout."""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from support.runs import read_scalars
from support.small_moe import make_config, make_mask, make_router, random_visible_sets
from support.training_runs import run_pairs

from maskmoe.megatron_compat.training_patches import RouterLossTracker
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
    """Only the second layer has got tokens, in two micro-batches; two ranks would have 4 experts each."""
    config, mask = make_config(8, 3, num_layers=2), make_mask(random_visible_sets(0, 2, 20, 8))
    chunk = torch.nn.ModuleList([make_router(config, mask, layer_number=layer) for layer in (1, 2)])
    chunk.config = replace(config, expert_model_parallel_size=2)
    args = Namespace(num_layers=2, moe_layer_freq=1, num_experts=8, mtp_num_layers=None)
    monkeypatch.setattr(routing_log, "get_args", lambda: args)
    # Tokens, routable tokens, the sum of their entropies, and the tokens of each expert.
    for rows, sums in ((12, [8, 4, 3.0, 5, 1, 0, 0, 4, 1, 1, 0]), (9, [8, 2, 1.5, 3, 1, 0, 0, 3, 1, 1, 0])):
        chunk[1].statistics.count_rows(rows)
        chunk[1].statistics.add_tokens(torch.tensor(sums, dtype=torch.float64))
    record = routing_log.take_record([chunk])
    expected = {
        "expert_load_max_over_mean": 8 / (21 / 8),
        "routing_entropy": 4.5 / 6,
        "single_expert_token_share": 10 / 16,
        "rank_load_max_over_mean": 11 / (21 / 2),
        "rank_rows_max": 12,
    }
    assert record.by_layer == {name: {1: pytest.approx(value)} for name, value in expected.items()}
    assert record.tokens_per_expert == {1: [8, 2, 0, 0, 7, 2, 2, 0]}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [1, 2, 3, 4]),
        ({"mtp_use_repeated_layer": True}, [1, 2, 3]),
        ({"moe_layer_freq": [1, 0]}, [1]),
        ({"hybrid_layer_pattern": "*E*-*E/*E/*E", "num_layers": 6}, [1, 3, 7, 8]),
        ({"hybrid_layer_pattern": "*E*-*E/*E/*E", "num_layers": 6, "mtp_use_repeated_layer": True}, [1, 3, 7]),
    ],
)
def test_losses_are_means_over_moe_layers(one_rank, settings, layers):
    """`layers` are the numbers under which Megatron-Core's routers record losses, which are 1 in every layer."""
    args = {"num_layers": 2, "moe_layer_freq": 1, "num_experts": 8, "mtp_num_layers": 2}
    args |= {"mtp_use_repeated_layer": False, "hybrid_layer_pattern": None, "moe_router_load_balancing_type": "none"}
    args |= settings
    tracker, losses = RouterLossTracker(Namespace(**args)), {}
    for layer in layers:
        tracker.record("z_loss", torch.ones(()), layer, num_layers=4)
    of_megatron = {"num_layers": 3, "moe_layer_freq": 1, "mtp_num_layers": 2, "force_initialize": True}
    tracker.report(1.0, 1, track_names=["z_loss"], total_loss_dict=losses, **of_megatron)
    assert losses == {"z_loss": 1.0}


def test_stage_without_moe_layers_sums_losses_over_the_ranks_of_the_other_stages(one_rank):
    types = ["aux_loss", "global_aux_loss"]
    sizes = {"num_layers": 2, "moe_layer_freq": [1, 0], "num_experts": 8, "mtp_num_layers": None}
    args = Namespace(**sizes, moe_router_load_balancing_type=types)
    tracker, names = RouterLossTracker(args), ["load_balancing_loss", "global_load_balancing_loss", "z_loss"]
    tracker.report(1.0, 1, track_names=names, total_loss_dict={})
    # A router with these losses records the groups.
    losses = {"moe_router_load_balancing_type": types, "moe_aux_loss_coeff": [0.1, 0.1]}
    set_moe_metrics_tracker(of_router := MoEMetricsTracker())
    mask = make_mask(random_visible_sets(0, 2, 20, 8))
    make_router(make_config(8, 3, num_layers=2, moe_z_loss_coeff=0.1, **losses), mask).routing(
        torch.randn(6, 2, 8, requires_grad=True), TokenIds(torch.ones(6, 2, dtype=torch.int64))
    )
    assert of_router.metrics.keys() == set(names)
    for name, expected in of_router.metrics.items():
        entry = tracker.metrics[name]
        assert entry.reduce_group is expected.reduce_group
        assert (entry.avg_group, entry.needs_dp_avg) == (expected.avg_group, expected.needs_dp_avg)


def test_only_losses_of_the_run_are_logged(one_rank):
    """Megatron asks for the loss of micro-batches whenever `aux_loss` is a part of the only type."""
    sizes = {"num_layers": 2, "moe_layer_freq": 1, "num_experts": 8, "mtp_num_layers": None}
    for kind, names in (("seq_aux_loss", {"seq_load_balancing_loss"}), ("aux_loss", {"load_balancing_loss"})):
        tracker, losses = RouterLossTracker(Namespace(**sizes, moe_router_load_balancing_type=kind)), {}
        tracker.report(1.0, 1, track_names=["load_balancing_loss", *names], total_loss_dict=losses)
        assert losses.keys() == names


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


@pytest.mark.parametrize(
    "layouts",
    run_pairs(
        ("reference", "expert parallel 2"),
        ("reference", "interleaved pipeline"),
        ("reference", "data parallel 2, distributed optimizer"),
        ("rich", "rich, tensor 2, expert parallel 2"),
        ("rich", "rich, pipeline 2"),
        ("experts of one rank", "experts of one rank, context parallel 2, expert parallel 2"),
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
