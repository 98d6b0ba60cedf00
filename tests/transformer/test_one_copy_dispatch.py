"""One-copy dispatch on 1 to 8 real ranks, and the choice of the way to dispatch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.launchers import RANK_SCRIPTS, RunRanks
from support.small_moe import make_config

from maskmoe.transformer.dispatch.choose import choose_dispatch
from maskmoe.transformer.dispatch.kind import DispatchKind


@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4, 8))])
def test_equals_one_process(tmp_path: Path, num_ranks: int, run_ranks: RunRanks) -> None:
    """Outputs and gradients equal up to rounding of sums of at most 32 terms, and every row crosses once."""
    run_ranks(RANK_SCRIPTS / "one_copy_ranks.py", tmp_path, 60, world_size=num_ranks, timeout=240)
    for rank in range(num_ranks):
        for result in json.loads((tmp_path / f"rank{rank}.json").read_text()):
            assert all(result[name] < 1e-5 for name in ("output", "hidden", "weights")), result
            assert result["scales"] < 1e-4, result
            if num_ranks > 1:
                assert result["excess_elements"] == 0
                assert result["calls"] == 4


def groups(expert_parallel: int = 2, expert_tensor_parallel: int = 1) -> SimpleNamespace:
    """Return a stand-in for a `ProcessGroupCollection` with the sizes that the choice reads."""
    sizes = {"ep": expert_parallel, "expt_tp": expert_tensor_parallel}
    return SimpleNamespace(**{name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()})


def test_kind_of_dispatch() -> None:
    assert choose_dispatch(make_config(4), groups(), is_rank_local=False) is DispatchKind.ONE_COPY
    assert choose_dispatch(make_config(4), groups(), is_rank_local=True) is DispatchKind.PLANNED
    no_jitter = make_config(4, moe_input_jitter_eps=0.0)
    assert choose_dispatch(no_jitter, groups(), is_rank_local=True) is DispatchKind.PLANNED
    for settings in (
        {"moe_expert_capacity_factor": 1.0},
        {"moe_input_jitter_eps": 0.1},
        {"moe_latent_size": 6},
        {"moe_enable_routing_replay": True},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    ):
        assert choose_dispatch(make_config(4, **settings), groups(), is_rank_local=True) is DispatchKind.ONE_COPY
    one_expert = make_config(4, topk=1)
    assert choose_dispatch(one_expert, groups(), is_rank_local=False) is DispatchKind.STOCK
    assert choose_dispatch(one_expert, groups(), is_rank_local=True) is DispatchKind.PLANNED
    one_expert_per_rank = make_config(8)
    assert choose_dispatch(one_expert_per_rank, groups(8), is_rank_local=False) is DispatchKind.STOCK
    assert choose_dispatch(one_expert_per_rank, groups(8), is_rank_local=True) is DispatchKind.PLANNED
    assert choose_dispatch(make_config(4), groups(), is_rank_local=True, is_mtp_layer=True) is DispatchKind.ONE_COPY


def test_settings_that_only_megatrons_dispatcher_supports() -> None:
    assert choose_dispatch(make_config(4), groups(expert_tensor_parallel=2), is_rank_local=True) is DispatchKind.STOCK
    for settings in (
        {"moe_token_dispatcher_type": "allgather"},
        {"moe_token_dispatcher_type": "flex"},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True},
    ):
        assert choose_dispatch(make_config(4, **settings), groups(), is_rank_local=True) is DispatchKind.STOCK


def test_deferred_weight_gradients_need_megatrons_dispatcher() -> None:
    """Without Transformer Engine, the configuration refuses the setting, so set it afterwards."""
    config = make_config(4)
    config.overlap_dispatch_backward_with_experts_wgrad = True
    assert choose_dispatch(config, groups(), is_rank_local=True) is DispatchKind.STOCK
