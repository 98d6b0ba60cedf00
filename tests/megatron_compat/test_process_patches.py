"""Patches: an optimizer without parameters, whole weights, helpers, and outdated patches."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.datasets import helpers_cpp, utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from maskmoe.errors import UserError
from maskmoe.megatron_compat import process_patches, replace


def test_optimizer_without_parameters_counts_and_restores_its_steps() -> None:
    """tests/training/test_resume.py saves and loads on real ranks, also on a stage without experts."""

    def make_optimizer() -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([{"params": []}])
        process_patches._count_steps_without_parameters(optimizer)
        return optimizer

    def steps(optimizer: torch.optim.Optimizer) -> list[float]:
        return [state["step"].item() for state in optimizer.state_dict()["state"].values()]

    trained, resumed = make_optimizer(), make_optimizer()
    assert steps(trained) == [0.0]
    for _ in range(3):
        trained.step()
    assert steps(trained) == [3.0]
    resumed.load_state_dict(trained.state_dict())
    resumed.step()
    assert steps(resumed) == [4.0]


def test_groups_without_parameters_have_the_step_of_the_others() -> None:
    """FusedAdam of Transformer Engine counts in groups, and leaves out groups without parameters."""

    class FusedAdam(torch.optim.SGD):
        pass

    def chain(*kinds: type[torch.optim.Optimizer]) -> ChainedOptimizer:
        members = [kind([{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": []}]) for kind in kinds]
        return ChainedOptimizer([SimpleNamespace(optimizer=member, config=None) for member in members])

    chained = chain(FusedAdam, FusedAdam, torch.optim.SGD)
    chained.chained_optimizers[0].optimizer.param_groups[0]["step"] = 7
    assert chained._synchronize_steps() == 7
    steps = [[group.get("step") for group in member.optimizer.param_groups] for member in chained.chained_optimizers]
    assert steps == [[7, 7], [7, 7], [None, None]]
    # Later versions count in groups without parameters, too, of which a rank may have no others.
    group = {"params": [], "step": 5}
    empty = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group]), config=None)
    assert ChainedOptimizer([empty, *chain(torch.optim.SGD).chained_optimizers])._synchronize_steps() is None
    assert group["step"] == 5


def test_whole_weights_of_precision_aware_optimizers_are_saved_and_loaded() -> None:
    """A stand-in for FusedAdam stores what bf16 weights lack, as signed numbers of 16 bits."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    remainders = torch.zeros(4096, dtype=torch.int16)
    fused = SimpleNamespace(
        store_param_remainders=True,
        param_groups=[{"params": [parameter]}],
        state={parameter: {"master_param": remainders}},
        get_unscaled_state=lambda _, name: remainders,
        set_scaled_state=lambda _, name, value: remainders.copy_(value),
    )
    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True)
    optimizer: Any = SimpleNamespace(optimizer=fused, config=config, model_param_group_index_map={"weight": (0, 0)})
    weights = torch.randn(4096)
    DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, "weight", {"param": weights.clone()})
    assert remainders.dtype == torch.int16
    assert (parameter - weights).abs().max() <= weights.abs().max() * 2**-8
    saved = DistributedOptimizer._get_main_param_and_optimizer_states(optimizer, "weight")
    assert torch.equal(saved["param"], weights)
    with pytest.raises(UserError, match="pass --no-load-optim"):
        DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, "weight", {"param": remainders.float()})


def test_patch_of_a_missing_attribute_fails() -> None:
    """A patch that was written for another version must not set an attribute that nothing reads."""
    with pytest.raises(AttributeError, match="no_such_function"):
        replace(torch.cuda, "no_such_function", print)


def test_helpers_of_the_wheel_are_used_as_they_are() -> None:
    assert utils.compile_helpers() is None
    assert callable(helpers_cpp.build_sample_idx_int32)


@pytest.mark.parametrize(
    ("setup", "handlers", "level"), [("", ["CustomHandler"], "INFO"), ("basicConfig()", ["StreamHandler"], "WARNING")]
)
def test_log_goes_to_megatron_or_to_the_script(setup: str, handlers: list[str], level: str) -> None:
    """emerging-optimizers would take the log of Megatron; a script that has set up its own log keeps its handlers."""
    pytest.importorskip("emerging_optimizers")
    code = f"""
import logging
logging.{setup or "root"}
from maskmoe.megatron_compat import prepare_process
prepare_process()
assert [type(handler).__name__ for handler in logging.root.handlers] == {handlers}
assert logging.root.level == logging.{level}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
