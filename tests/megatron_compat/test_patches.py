"""Patches: optimizer state without Apex and Transformer Engine, the helper of the wheel, and outdated patches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets import helpers_cpp, utils
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from maskmoe.megatron_compat import patches, replace

without_apex = pytest.mark.skipif(distrib_optimizer.HAVE_APEX_OR_TE, reason="Apex and Transformer Engine need no patch")
DEVICE = torch.device(torch.cuda.current_device())


class TwoLinears(MegatronModule):
    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.first = torch.nn.Linear(4, 6)
        self.second = torch.nn.Linear(6, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(hidden))


class Trained:
    """A model with Megatron's distributed optimizer."""

    def __init__(self, bf16: bool) -> None:
        dtype = torch.bfloat16 if bf16 else torch.float32
        config = TransformerConfig(
            num_layers=1,
            hidden_size=4,
            num_attention_heads=1,
            bf16=bf16,
            params_dtype=dtype,
            use_cpu_initialization=True,
        )
        torch.manual_seed(0)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config, settings, TwoLinears(config).to(DEVICE, dtype))
        self.dtype = dtype
        optimizer_config = OptimizerConfig(
            optimizer="adam", lr=0.1, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @property
    def steps(self) -> set[float]:
        (distributed,) = self.optimizer.chained_optimizers
        return {float(state["step"]) for state in distributed.optimizer.state.values()}

    def step(self, seed: int) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE, self.dtype)
        self.model(hidden).square().sum().backward()
        self.model.finish_grad_sync()
        self.optimizer.step()

    def save(self, folder: Path) -> None:
        folder.mkdir()
        dist_checkpointing.save(self._sharded_state(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self._sharded_state(is_loading=True), str(folder))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sharded_state(self, is_loading: bool) -> dict:
        model_state = self.model.module.sharded_state_dict()
        optimizer_state = self.optimizer.sharded_state_dict(
            model_state, is_loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )
        return {"model": model_state, "optimizer": optimizer_state}


@without_apex
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_loaded_optimizer_continues_bit_for_bit(bf16: bool, tmp_path: Path) -> None:
    whole = Trained(bf16)
    for seed in range(3):
        whole.step(seed)
    whole.save(tmp_path / "checkpoint")
    resumed = Trained(bf16)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.steps == whole.steps == {3.0}
    for seed in range(3, 6):
        whole.step(seed)
        resumed.step(seed)
        assert all(torch.equal(x, y) for x, y in zip(whole.parameters, resumed.parameters, strict=True))
    # A step tensor that all parameters share would advance once for each parameter.
    assert resumed.steps == whole.steps == {6.0}


@without_apex
@pytest.mark.usefixtures("one_rank")
def test_state_can_be_taken_before_the_first_step() -> None:
    fresh = Trained(bf16=False)
    before = fresh.parameters
    fresh.optimizer.state_dict()
    assert fresh.steps == {0.0}
    assert all(torch.equal(x, y) for x, y in zip(fresh.parameters, before, strict=True))
    stepped = Trained(bf16=False)
    for trained in (fresh, stepped):
        trained.step(1)
    assert all(torch.equal(x, y) for x, y in zip(fresh.parameters, stepped.parameters, strict=True))


def test_optimizer_without_parameters_counts_and_restores_its_steps() -> None:
    """Saving on real ranks is in tests/training/test_resume.py, "stage without experts"."""

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
