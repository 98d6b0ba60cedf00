"""Patches: an optimizer without parameters, one loss scale, gradients without Apex, helpers, and outdated patches."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets import helpers_cpp, utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from maskmoe.errors import UserError
from maskmoe.megatron_compat import patches, replace

DEVICE = torch.device(torch.cuda.current_device())


def test_optimizer_without_parameters_counts_and_restores_its_steps() -> None:
    """tests/training/test_resume.py saves and loads on real ranks, also on a stage without experts."""

    def make_optimizer() -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([{"params": []}])
        patches._count_steps_without_parameters(optimizer)
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


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("dtype", "main_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_gradients_are_accumulated_with_and_without_apex(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=1,
        params_dtype=dtype,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
    )
    layer = ColumnParallelLinear(4, 6, config=config, init_method=torch.nn.init.normal_, bias=False).to(DEVICE)
    layer.weight.main_grad = torch.ones_like(layer.weight, dtype=main_dtype)
    expected = torch.ones_like(layer.weight, dtype=torch.float64)
    for seed in range(2):
        inputs, gradients = (
            torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) for size in (4, 6)
        )
        layer(inputs)[0].backward(gradients)
        expected += gradients.flatten(0, 1).double().t() @ inputs.flatten(0, 1).double()
    tolerance = 1e-5 if main_dtype == torch.float32 else 5e-2
    torch.testing.assert_close(layer.weight.main_grad.double(), expected, rtol=tolerance, atol=tolerance)
    assert layer.weight.grad is None


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_product_on_gpus_takes_the_dtypes(main_dtype: torch.dtype) -> None:
    """A meta tensor takes the way of a GPU and computes nothing."""
    inputs, gradients = (torch.empty(3, size, device="meta", dtype=torch.bfloat16) for size in (4, 6))
    patches._add_weight_gradient(inputs, gradients, torch.empty(6, 4, device="meta", dtype=main_dtype))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_an_overflow_of_one_optimizer_counts_for_all(overflows: list[tuple[bool, bool]]) -> None:
    """The second optimizer begins with another scale, as after a resume of an older checkpoint."""

    class Optimizer:
        def __init__(self, initial_scale: float) -> None:
            self.grad_scaler = DynamicGradScaler(initial_scale, 1, 2, 0.5, growth_interval=2, hysteresis=2)
            self.overflows, self.scales_of_gradients = [False], list[float]()

        def prepare_grads(self) -> bool:
            self.scales_of_gradients.append(self.grad_scaler.scale.item())
            self.grad_scaler.update(self.overflows[-1])
            return self.overflows[-1]

    chained = ChainedOptimizer.__new__(ChainedOptimizer)
    chained.chained_optimizers = [dense, experts] = [Optimizer(1024), Optimizer(64)]
    alone = Optimizer(1024)
    for dense.overflows[-1], experts.overflows[-1] in overflows:
        alone.overflows[-1] = dense.overflows[-1] or experts.overflows[-1]
        assert chained.prepare_grads() == alone.prepare_grads()
        assert dense.grad_scaler.state_dict() == experts.grad_scaler.state_dict() == alone.grad_scaler.state_dict()
    assert dense.scales_of_gradients == experts.scales_of_gradients == alone.scales_of_gradients


def test_patch_of_a_missing_attribute_fails() -> None:
    """A patch that was written for another version must not set an attribute that nothing reads."""
    with pytest.raises(AttributeError, match="no_such_function"):
        replace(torch.cuda, "no_such_function", print)


def test_helpers_of_the_wheel_are_used_as_they_are() -> None:
    assert utils.compile_helpers() is None
    assert callable(helpers_cpp.build_sample_idx_int32)


def test_checkout_of_megatron_compiles_its_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setattr(utils, "compile_helpers", original := lambda: None)
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)  # is not compiled yet
    patches.use_compiled_helpers_of_wheel()
    assert utils.compile_helpers is original


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
