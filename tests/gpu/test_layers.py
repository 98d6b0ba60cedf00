"""Layers on GPUs over NCCL; the same checks run on CPU cores over gloo, in the branches of GPUs.

On one GPU, the expert-parallel group has one rank, and dispatchers are built directly, because a layer on one rank
would choose Megatron-Core's. All ranks are one expert-parallel group, and the number of experts grows with the number
of ranks.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from device_meter import device_cost_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from meter import Operations, cost_of
from routed_tokens import let_one_rank_plan
from support.launchers import RunRanks
from support.places import PLACES, Place, take_gpu_branches
from support.small_moe import DEVICE, draw_parameters, initialize_parallelism, make_config, make_layer, make_mask
from torch import Tensor
from torch.nn.functional import linear, silu

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.dispatch.plan import DispatchPlanner
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids
from maskmoe.transformer.visible_experts import VisibleExperts

# bf16 has 8 significant bits, and several roundings follow one another. The difference relates to the largest value.
BF16_TOLERANCE = 2e-2
FP32_TOLERANCE = 1e-4

Check = Callable[[Place, str], list[Any]]

LOCAL_EXPERTS, TOPK, VOCAB_SIZE, TOKENS, HIDDEN, WIDTH = 4, 2, 50, 96, 64, 32


@dataclass(frozen=True)
class Setting:
    """A mask on the expert-parallel ranks.

    Attributes:
        groups: the process groups.
        mask: every id sees k or more experts, all on one rank.
        visible: bool [vocab, experts], the visible experts.
    """

    groups: ProcessGroupCollection
    mask: RoutingMask
    visible: np.ndarray

    @classmethod
    def draw(cls, groups: ProcessGroupCollection) -> "Setting":
        rng = np.random.default_rng(0)
        num_ranks = groups.ep.size()
        visible = np.zeros((VOCAB_SIZE, num_ranks, LOCAL_EXPERTS), bool)
        num_visible = rng.integers(TOPK, LOCAL_EXPERTS + 1, (VOCAB_SIZE, 1))
        home = rng.integers(num_ranks, size=VOCAB_SIZE)
        visible[np.arange(VOCAB_SIZE), home] = rng.random((VOCAB_SIZE, LOCAL_EXPERTS)).argsort(axis=1) < num_visible
        visible = visible.reshape(VOCAB_SIZE, -1)
        return cls(groups, make_mask(visible[None]), visible)

    def config(self, **settings: Any) -> TransformerConfig:
        num_ranks = self.groups.ep.size()
        sizes = {"hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "expert_model_parallel_size": num_ranks}
        return make_config(LOCAL_EXPERTS * num_ranks, TOPK, **sizes, **settings)

    def planner(self, visible_experts: VisibleExperts) -> DispatchPlanner:
        if self.groups.ep.size() == 1:
            let_one_rank_plan(visible_experts, self.mask)
        return DispatchPlanner(visible_experts, TOPK, [0], self.groups.ep)

    def draw_ids(self) -> Tensor:
        """Return ids [1, tokens] that differ between the ranks."""
        rng = np.random.default_rng(self.groups.ep.rank())
        return torch.from_numpy(rng.integers(0, VOCAB_SIZE, (1, TOKENS))).to(DEVICE)


@dataclass(frozen=True)
class LayerWork:
    """A layer and its input.

    Attributes:
        layer: the layer.
        hidden: the input [tokens, 1, hidden].
        token_ids: the ids of the input, with a plan if dispatch is planned.
    """

    layer: MaskMoELayer
    hidden: Tensor
    token_ids: TokenIds

    @classmethod
    def build(
        cls,
        setting: Setting,
        kind: DispatchKind,
        has_experts: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        has_losses: bool = True,
    ) -> "LayerWork":
        """Build a layer that dispatches in the given way, also on one rank.

        Args:
            setting: mask and ranks.
            kind: the way to dispatch.
            has_experts: whether the experts compute; otherwise they multiply rows by their weights, and never read
                the number of their rows.
            dtype: the dtype of parameters and input.
            has_losses: whether the router has losses.
        """
        losses = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3} if has_losses else {}
        config = setting.config(params_dtype=dtype, bf16=dtype is torch.bfloat16, **losses)
        layer = make_layer(config, setting.mask)
        draw_parameters(layer)
        layer.dispatcher = build_dispatcher(kind, layer, setting.groups)
        if not has_experts:
            layer.experts.forward = lambda rows, tokens_per_expert, weights: (
                (rows * weights.unsqueeze(-1)).to(rows.dtype),
                None,
            )
        token_ids = TokenIds(setting.draw_ids())
        if kind is DispatchKind.PLANNED:
            token_ids = TokenIds(token_ids.ids, plan=setting.planner(layer.router.visible_experts).plan(token_ids))
        return cls(layer, torch.randn(TOKENS, 1, HIDDEN, device=DEVICE, dtype=dtype), token_ids)

    def run(self) -> tuple[Tensor, Tensor]:
        """Return output and gradient of the input."""
        hidden = self.hidden.detach().requires_grad_()
        output, _ = self.layer(hidden, padding_mask=pack_token_ids(self.token_ids))
        output.backward(torch.ones_like(output))
        return output, hidden.grad

    def results(self) -> dict[str, Tensor]:
        """Return output, and gradients of the input and of the experts."""
        output, gradient = self.run()
        gradients = {name: parameter.grad for name, parameter in self.layer.experts.named_parameters()}
        return {"output": output.detach(), "gradient of the input": gradient, **gradients}


def check_device(setting: Setting) -> dict[str, Any]:
    """Return the devices of a layer's tensors, the kernels that it launches, and the backend of the collectives."""
    work = LayerWork.build(setting, DispatchKind.PLANNED)
    tensors = [*work.run(), *work.layer.parameters(), *(parameter.grad for parameter in work.layer.parameters())]
    return {
        "devices": sorted({tensor.device.type for tensor in tensors}),
        "backend": torch.distributed.get_backend(),
        **asdict(device_cost_of(work.run)),
    }


def check_dispatch(setting: Setting) -> dict[str, float]:
    """Return the largest differences from Megatron-Core's dispatcher, by dispatcher, dtype and result.

    The differences relate to the largest value of a result.
    """
    differences = {}
    for dtype in (torch.float32, torch.bfloat16):
        # Each rank's losses are those of the tokens that it routes, which depend on the plan.
        work = partial(LayerWork.build, setting, dtype=dtype, has_losses=False)
        with Operations() as megatrons:
            expected = work(DispatchKind.STOCK).results()
        for kind in (DispatchKind.ONE_COPY, DispatchKind.PLANNED):
            with Operations() as ours:
                results = work(kind).results()
            assert ours.names != megatrons.names, f"{kind} is Megatron-Core's own dispatch"
            for name, value in results.items():
                found, stock = value.double(), expected[name].double()
                difference = (found - stock).abs().max() / stock.abs().max()  # Fails for an empty result.
                differences[f"{kind.name}, {dtype}, {name}"] = difference.item()
    return differences


def check_experts(setting: Setting) -> dict[str, Any]:
    """Compare the gradients of bf16 experts, some without rows, with float32; the allocator's free memory is NaN.

    Returns:
        Relative differences by name, and whether gradients of experts without rows are 0.
    """
    experts = LayerWork.build(setting, DispatchKind.STOCK).layer.experts
    tokens_per_expert = [5, 0, 19, 0]
    generator = torch.Generator().manual_seed(setting.groups.ep.rank())
    rows, gradient = torch.randn(2, sum(tokens_per_expert), HIDDEN, generator=generator).to(DEVICE, torch.bfloat16)
    probs = torch.rand(len(rows), generator=generator).to(DEVICE)
    rows.requires_grad_(), probs.requires_grad_()
    dirty_the_allocator()
    output, _ = experts(rows, torch.tensor(tokens_per_expert), probs)
    output.backward(gradient)

    # The same in float32, one expert after the other.
    exact = {name: value.detach().float().requires_grad_() for name, value in experts.named_parameters()}
    exact_rows, exact_probs = (values.detach().float().requires_grad_() for values in (rows, probs))
    outputs = []
    for expert, (own, weights) in enumerate(
        zip(exact_rows.split(tokens_per_expert), exact_probs.split(tokens_per_expert), strict=True)
    ):
        gate, value = linear(own, exact[f"local_experts.{expert}.linear_fc1.weight"]).chunk(2, dim=-1)
        activated = silu(gate) * value * weights.unsqueeze(1)
        outputs.append(linear(activated, exact[f"local_experts.{expert}.linear_fc2.weight"]))
    expected = torch.cat(outputs)
    expected.backward(gradient.float())

    pairs = {
        "output": (output, expected),
        "rows": (rows.grad, exact_rows.grad),
        "probs": (probs.grad, exact_probs.grad),
    }
    differences, of_empty_experts = {}, {}
    for name, parameter in experts.named_parameters():
        if tokens_per_expert[int(name.split(".")[1])] == 0:
            of_empty_experts[name] = bool((parameter.grad == 0).all())
        else:
            pairs[name] = (parameter.grad, exact[name].grad)
    for name, (found, exact_value) in pairs.items():
        differences[name] = ((found.float() - exact_value).abs().max() / exact_value.abs().max()).item()
    return {
        "differences": differences,
        "zero": of_empty_experts,
    }


def dirty_the_allocator() -> None:
    """Free blocks of all sizes that are full of NaN, which the allocator hands out next."""
    blocks = [
        torch.full((1 << power,), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        for power in range(6, 20)
        for _ in range(8)
    ]
    del blocks


def check_waits(setting: Setting) -> dict[str, int]:
    """Return how often the host waits in the forward and backward pass of a layer without experts, by dispatch.

    Experts that take turns would wait for the numbers of their rows.
    """
    found = {}
    for kind in (DispatchKind.PLANNED, DispatchKind.ONE_COPY, DispatchKind.STOCK):
        found[kind.name.lower()] = count_waits(LayerWork.build(setting, kind, has_experts=False).run)
    return found


def count_waits(work: Callable[[], object]) -> int:
    """Return how often the host waits for the device; without a GPU, how often it would wait."""
    if DEVICE.type == "cpu":
        return cost_of(work).host_waits
    work()  # The first call loads kernels.
    waits_for_events = []
    wait = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        waits_for_events.append(event)
        wait(event)

    # torch warns of every wait but those for events.
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen, patch.object(torch.cuda.Event, "synchronize", counted):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(waits_for_events) + sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


CHECKS = {"device": check_device, "dispatch": check_dispatch, "experts": check_experts, "waits": check_waits}


def run_checks(names: Sequence[str]) -> dict[str, Any]:
    """Return the results of some checks on this rank."""
    if DEVICE.type == "cpu":
        take_gpu_branches()
    num_ranks = torch.distributed.get_world_size()
    setting = Setting.draw(initialize_parallelism(expert_model_parallel_size=num_ranks))
    # Training sets the scale of router losses on the device.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=DEVICE))
    return {name: CHECKS[name](setting) for name in names}


@pytest.fixture(scope="module")
def check(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Return a function that runs a check and returns the results of each rank."""

    @cache
    def run(place: Place, checks: tuple[str, ...]) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("device")
        return run_ranks(run_checks, folder, checks, world_size=place.num_ranks(), sees_gpus=place.is_gpu)

    def check(place: Place, name: str) -> list[Any]:
        # A failure on a GPU can make later work of its process fail, so each check has a process of its own there.
        return [results[name] for results in run(place, (name,) if place.is_gpu else tuple(CHECKS))]

    return check


@pytest.mark.parametrize("place", PLACES)
def test_everything_is_on_the_device(place: Place, check: Check) -> None:
    for found in check(place, "device"):
        assert found["devices"] == (["cuda"] if place.is_gpu else ["cpu"])
        assert found["backend"] == ("nccl" if place.is_gpu else "gloo")
        assert (found["kernels"] > 0) is place.is_gpu
        assert (found["device_seconds"] > 0) is place.is_gpu


@pytest.mark.parametrize("place", PLACES)
def test_dispatch_equals_megatrons(place: Place, check: Check) -> None:
    """Each token has two experts, so every sum has two terms and does not depend on their order."""
    for found in check(place, "dispatch"):
        assert len(found) == 40
        for name, difference in found.items():
            # Planned dispatch multiplies by the gate's weights on the receiving rank, with another number of rows.
            # cuBLAS chooses its kernel by the number of rows, so the results may be rounded in another way.
            tolerance = FP32_TOLERANCE if "float32" in name else BF16_TOLERANCE
            assert difference <= (tolerance if place.is_gpu and name.startswith("PLANNED") else 0), name


@pytest.mark.parametrize("place", PLACES)
def test_gradients_of_experts_without_rows_are_zero(place: Place, check: Check) -> None:
    for found in check(place, "experts"):
        assert len(found["zero"]) == 4
        assert all(found["zero"].values()), found["zero"]
        # NaN is not below the tolerance either.
        assert len(found["differences"]) == 7
        assert all(value < BF16_TOLERANCE for value in found["differences"].values()), found["differences"]


@pytest.mark.parametrize("place", PLACES)
def test_host_waits(place: Place, check: Check) -> None:
    for found in check(place, "waits"):
        assert found == {"planned": 0, "one_copy": 1, "stock": 1}
