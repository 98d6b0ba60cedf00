"""Collapsed routing is reported once with layer and expert or rank, and so is its end."""

from argparse import Namespace

import pytest

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.watch import routing_log
from maskmoe.training.watch.routing_collapse import RoutingCollapse, reachable_experts
from maskmoe.training.watch.routing_log import RoutingLog, RoutingRecord


def take_all(collapse: RoutingCollapse, *intervals: tuple[list[int], float | None]) -> list[list[str]]:
    """Return the lines of each interval of layer 3: tokens of the experts, and the entropy."""
    return [collapse.take({3: tokens}, {} if entropy is None else {3: entropy}) for tokens, entropy in intervals]


BUSY, IDLE_1, IDLE_3, IDLE_23 = ([5, 5, 5, 5], 0.5), ([9, 0, 5, 5], 0.5), ([9, 5, 5, 0], 0.5), ([9, 9, 0, 0], 0.5)


@pytest.mark.parametrize(
    ("num_ranks", "intervals", "lines"),
    [
        (1, [IDLE_1, BUSY, IDLE_1, BUSY], {}),
        (1, [IDLE_1, IDLE_1], {1: "MoE layer 3: expert 1 got no token for 2 log intervals"}),
        (
            1,
            [IDLE_23, IDLE_23, IDLE_23, BUSY, BUSY],
            {
                1: "MoE layer 3: experts 2, 3 got no token for 2 log intervals",
                3: "MoE layer 3: experts 2, 3 get tokens again",
            },
        ),
        (
            2,
            [IDLE_23, IDLE_23, IDLE_23, BUSY],
            {
                1: "MoE layer 3: expert-parallel rank 1 got no token for 2 log intervals",
                3: "MoE layer 3: expert-parallel rank 1 gets tokens again",
            },
        ),
        (
            2,
            [IDLE_3, IDLE_3, IDLE_23, BUSY, IDLE_23, BUSY],
            {
                1: "MoE layer 3: expert 3 got no token for 2 log intervals",
                3: "MoE layer 3: expert 3 gets tokens again",
            },
        ),
        # An expert of a rank that recovers is reported if the expert does not recover.
        (
            2,
            [IDLE_23, IDLE_23, IDLE_3, BUSY],
            {
                1: "MoE layer 3: expert-parallel rank 1 got no token for 2 log intervals",
                2: "MoE layer 3: expert 3 got no token for 2 log intervals\n"
                "MoE layer 3: expert-parallel rank 1 gets tokens again",
                3: "MoE layer 3: expert 3 gets tokens again",
            },
        ),
        (
            1,
            [([5] * 4, 0.0), ([5] * 4, 1e-6), ([5] * 4, 0.2)],
            {
                1: "MoE layer 3: the routing entropy has been 0 for 2 log intervals",
                2: "MoE layer 3: the routing entropy is above 0 again",
            },
        ),
        (1, [([5] * 4, None)] * 5, {}),
    ],
)
def test_events(num_ranks, intervals, lines):
    collapse = RoutingCollapse(2, {3: [True] * 4}, num_ranks)
    taken = take_all(collapse, *intervals)
    assert {number: "\n".join(found) for number, found in enumerate(taken) if found} == lines


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_experts_that_no_id_sees_are_left_out(num_ranks):
    collapse = RoutingCollapse(1, {3: [True, False, False, False]}, num_ranks)
    assert take_all(collapse, ([7, 0, 0, 0], None)) == [[]]
    collapse = RoutingCollapse(1, {3: [True, True, False, True]}, num_ranks)
    (lines,) = take_all(collapse, ([7, 7, 0, 0], None))
    assert lines == [
        f"MoE layer 3: {'expert-parallel rank 1' if num_ranks == 2 else 'expert 3'} got no token for 1 log interval"
    ]


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


def test_collapse_is_reported_and_so_is_its_end(workplace, capsys, monkeypatch):
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    args = Namespace(
        **{"log_interval": 2, "collapse_intervals": 2, "expert_model_parallel_size": 2},
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
    assert lines == [
        "warning: MoE layer 2: expert-parallel rank 0 got no token for 2 log intervals",
        "warning: MoE layer 2: expert-parallel rank 0 gets tokens again",
    ]


@pytest.mark.runs("second rank without tokens")
def test_sound_routing_is_not_reported(runs):
    """Every id sees one of the first four experts: four experts get nothing, and there is no entropy."""
    (run,) = runs
    assert "warning: MoE layer" not in run.output
