"""The recommended interval between saves: its arithmetic, and what it takes from the journal of a run."""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.check.assumed_cluster import NODE_MTBF_DAYS, AssumedCluster
from maskmoe.check.save_interval import Duration, History, SaveInterval, recommend_save_interval
from maskmoe.launch.journal import Entry, Journal, Kind
from maskmoe.processes.interruption import EXIT_REQUEUE

DAY = 24 * 3600
POSITIVE = st.floats(1e-3, 1e4)


def interval(save=60.0, step=10.0, ranks=64, **settings) -> SaveInterval:
    return SaveInterval(Duration(save, "a", False), Duration(step, "b", False), AssumedCluster(ranks), **settings)


def test_the_default_is_the_published_rate():
    """419 unexpected interruptions in 54 days on 2,048 nodes."""
    assert pytest.approx(54 * 2048 / 419, rel=1e-3) == NODE_MTBF_DAYS
    assert AssumedCluster(16384).mtbf_days == pytest.approx(54 / 419, rel=1e-3)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_nodes_of_eight_ranks(ranks, nodes):
    cluster = AssumedCluster(ranks, node_mtbf_days=100, write_gigabytes=2)
    assert (cluster.nodes, cluster.mtbf_days) == (nodes, 100 / nodes)
    assert cluster.seconds_of_writing(8e9) == 4 / nodes
    assert cluster.seconds_of_copying(8e9) == 0.8 / ranks


@given(save=POSITIVE, step=POSITIVE, ranks=st.integers(1, 1 << 16), factor=st.floats(0.1, 10))
def test_no_other_interval_costs_less(save, step, ranks, factor):
    recommended = interval(save, step, ranks)
    mtbf = recommended.cluster.mtbf_days * DAY
    assert recommended.best_seconds == pytest.approx(math.sqrt(2 * save * mtbf))
    assert abs(recommended.iterations - recommended.best_seconds / step) <= 0.5 or recommended.iterations == 1
    other = max(1, round(recommended.iterations * factor))
    # Rounding to whole iterations may let a neighbour be better, by little.
    assert recommended.lost_share(recommended.iterations) <= recommended.lost_share(other) * 1.3
    if recommended.iterations > 50:
        assert recommended.lost_share(recommended.iterations) == pytest.approx(math.sqrt(2 * save / mtbf), rel=1e-3)


def test_text():
    recommended = interval(given=500, failures=2, days=12.5)
    assert recommended.recommendation == (
        "--save-interval 1850 recommended, 308 minutes: saves and failures then cost 0.65 % of the time"
    )
    assert recommended.lines == (
        "a save      stops training for 60 s: a",
        "a step      takes 10 s: b",
        "failures    one every 33 days: nodes of 8 ranks, here 8, fail every 264 days each, which is assumed, not "
        "measured; this run: 2 in 12.5 days",
        "given       --save-interval 500 costs 1.3 %",
    )
    assert len(interval(given=1850).lines) == 3
    short = interval(last_iteration=100, given=10)
    assert short.iterations == 100
    assert short.recommendation.startswith("one save at the end is enough: the run takes 16.7 minutes")
    assert len(short.lines) == 3


def test_asynchronous_saves_do_not_overlap():
    assert interval(save=1e-6, shortest_seconds=1000).iterations == 100


def entries_of(*events) -> list[Entry]:
    """Return entries of (kind, time, iteration, facts)."""
    return [Entry(kind, "", time, "host", iteration, facts) for kind, time, iteration, facts in events]


def save(time, iteration, seconds, is_local=False, is_asynchronous=False):
    facts = {"seconds": seconds, "is_local": is_local, "is_asynchronous": is_asynchronous}
    return Kind.SAVED, time, iteration, facts


def start(time):
    return Kind.STARTED, time, None, {"ranks": 8}


def end(time, code):
    return Kind.ENDED, time, None, {"exit_code": code}


def test_saves_and_steps_are_measured():
    entries = entries_of(
        start(0),
        save(100, 10, 2.0),
        save(122, 20, 2.0),  # 10 steps of 2 s
        save(132, 25, 0.1, is_local=True),
        end(140, 1),
        start(1000),  # the pause is not time of steps
        save(1100, 30, 4.0),
        save(1124, 40, 4.0),
    )
    history = History.of(entries, is_asynchronous=False)
    assert history.save == Duration(3.0, "measured, the median of 4 saves", True)
    assert history.step.seconds == pytest.approx(2.0)
    assert history.step.is_measured
    assert (history.failures, history.days) == (1, 1124 / DAY)
    assert History.of(entries, is_asynchronous=True).save is None
    only_local = History.of(entries_of(save(1, 5, 0.5, is_local=True)), is_asynchronous=False)
    assert only_local.save.seconds == 0.5
    assert only_local.step is None
    assert History.of([], is_asynchronous=False) == History()


def test_failures_of_a_start_count_once():
    """Launchers of several nodes record the same start and the same end. A signal that saves is no failure."""
    entries = entries_of(
        *(start(0), start(1), end(5, 1), end(6, 1)),
        *(start(10), start(11), end(15, EXIT_REQUEUE), end(16, EXIT_REQUEUE)),
        *(start(20), end(25, 76)),
        *(start(30), end(35, 0)),
    )
    assert History.of(entries, is_asynchronous=False).failures == 2


@pytest.mark.parametrize("facts", [{}, {"seconds": "long"}, {"seconds": True}, {"seconds": -1.0}, {"seconds": 1e400}])
def test_damaged_entries_are_ignored(facts):
    entries = entries_of(*[(Kind.SAVED, time, time, facts | {"is_asynchronous": False}) for time in (1, 2)])
    assert History.of(entries, is_asynchronous=False).save is None


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_estimate_and_measurement(tmp_path, is_asynchronous):
    args = Namespace(
        async_save=is_asynchronous,
        params_dtype=torch.bfloat16,
        optimizer="adam",
        use_precision_aware_optimizer=False,
        accumulate_allreduce_grads_in_fp32=True,
        no_save_optim=None,
        train_iters=10**6,
        save_interval=None,
        assumed_node_mtbf=100.0,
        assumed_write_bandwidth=2.0,
    )
    layout = SimpleNamespace(ranks=16, tokens_per_step=1000)
    model = SimpleNamespace(whole=SimpleNamespace(num_parameters=10**9))
    gpu = SimpleNamespace(hours=lambda flops: flops / 3600)
    cost = SimpleNamespace(flops_per_token=1.5, recomputed_flops_per_token=0.1, gpu=gpu)

    def recommend():
        return recommend_save_interval(args, layout, model, cost, tmp_path)

    # 14 bytes a parameter: bf16 weights, and fp32 main copies and two moments.
    estimate = recommend()
    assert estimate.save.seconds == pytest.approx(14e9 / (16 * 10e9) if is_asynchronous else 14e9 / (2 * 2e9))
    assert "14 GB" in estimate.save.source
    assert "assumed" in estimate.save.source
    assert estimate.step.seconds == 100
    assert not estimate.save.is_measured
    assert estimate.shortest_seconds == (3.5 if is_asynchronous else 0)
    journal = Journal(tmp_path)
    journal.write(Kind.SAVED, "saved", 10, seconds=0.25, is_local=False, is_asynchronous=is_asynchronous)
    measured = recommend()
    assert measured.save == Duration(0.25, measured.save.source, True)
    assert measured.step == estimate.step
    assert measured.shortest_seconds == 0
    cost.flops_per_token = cost.recomputed_flops_per_token = 0
    assert recommend() is None
