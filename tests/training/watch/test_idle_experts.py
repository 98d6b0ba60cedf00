"""Idle experts are reported once with their layer."""

from argparse import Namespace

import pytest

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.watch import routing_log
from maskmoe.training.watch.routing_log import IdleExperts, RoutingLog, RoutingRecord, reachable_experts

BUSY, IDLE_1, IDLE_23 = [5, 5, 5, 5], [9, 0, 5, 5], [9, 9, 0, 0]
IDLE_1_LINE = "MoE layer 3: expert 1 got no token for 2 log intervals"


@pytest.mark.parametrize(
    ("intervals", "lines"),
    [
        ([IDLE_1, BUSY, IDLE_1, BUSY], {}),
        ([IDLE_1, IDLE_1, IDLE_1], {1: IDLE_1_LINE}),
        ([IDLE_1, IDLE_1, BUSY, IDLE_1, IDLE_1], {1: IDLE_1_LINE, 4: IDLE_1_LINE}),
        ([IDLE_23, IDLE_23], {1: "MoE layer 3: experts 2, 3 got no token for 2 log intervals"}),
    ],
)
def test_reports(intervals, lines):
    idle = IdleExperts(2, {3: [True] * 4})
    taken = [idle.take({3: tokens}) for tokens in intervals]
    assert {number: "\n".join(found) for number, found in enumerate(taken) if found} == lines


def test_experts_that_no_id_sees_are_left_out():
    idle = IdleExperts(1, {3: [True, True, False, True]})
    assert idle.take({3: [7, 7, 0, 0]}) == ["MoE layer 3: expert 3 got no token for 1 log interval"]


@pytest.mark.parametrize("name", ["mask", "starving", "hash_layers"])
def test_reachable_experts_are_those_of_the_visible_sets(workplace, name):
    mask = RoutingMask.load(workplace.folder / f"{name}.safetensors")
    layers = FeedForwardLayers((True,) * 4, (True,))
    reachable = reachable_experts(mask, FeedForwardLayers((True, False, True, True)))
    assert list(reachable) == [0, 2, 3]
    for layer in reachable:
        assert reachable[layer] == mask.visible_sets(layer).any(axis=0).tolist()
    if len(mask.row_of_id) == 1:
        assert set(reachable_experts(mask, layers)) == {0, 1, 2, 3, 4}
    assert (name == "starving") == (not all(map(all, reachable.values())))


def test_idle_experts_are_reported(workplace, capsys, monkeypatch):
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    args = Namespace(
        **{"log_interval": 2, "collapse_intervals": 2},
        **{"num_layers": 4, "moe_layer_freq": 1, "num_experts": 8, "mtp_num_layers": None},
    )
    log = RoutingLog(args, mask)
    monkeypatch.setattr(routing_log, "is_last_rank", lambda: True)
    for iteration, tokens in ((2, [0] * 4), (4, [0] * 4), (6, [5] * 4)):
        record = RoutingRecord({"routing_entropy": {2: 0.5}}, {2: [*tokens, 5, 5, 5, 5]})
        monkeypatch.setattr(routing_log, "take_record", lambda chunks, record=record: record)
        args.curr_iteration = iteration - 1
        log.after_gradients([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert lines == ["warning: MoE layer 2: experts 0, 1, 2, 3 got no token for 2 log intervals"]


@pytest.mark.runs("second rank without tokens")
def test_sound_routing_is_not_reported(runs):
    """Every id sees one of the first four experts: four experts get nothing, and there is no entropy."""
    (run,) = runs
    assert "warning: MoE layer" not in run.output
