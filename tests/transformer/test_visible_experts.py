"""The routing mask on the device and in checkpoints."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.module import Float16Module
from support.small_moe import DEVICE, make_config, make_mask, make_visible_experts, process_groups, random_visible_sets
from torch import Tensor

from maskmoe.checkpoint.read_routing_mask import BUFFERS, routing_mask_from_buffers
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import VisibleExperts


@given(
    seed=st.integers(0, 2**32 - 1),
    tables=st.integers(1, 3),
    vocab_size=st.integers(1, 40),
    num_experts=st.integers(2, 70),
    smallest=st.sampled_from([1, 2]),
)
def test_lookup_equals_the_mask(seed: int, tables: int, vocab_size: int, num_experts: int, smallest: int) -> None:
    sizes = tuple(range(smallest, num_experts + 1))
    mask = make_mask(random_visible_sets(seed, tables, vocab_size, num_experts, sizes), num_layers=max(tables, 2))
    if tables == 3:
        mask = make_mask(random_visible_sets(seed, tables, vocab_size, num_experts, sizes))
    module = make_visible_experts(make_config(num_experts, num_layers=mask.num_layers), mask)
    token_ids = np.random.default_rng(seed).integers(0, vocab_size, 30)
    for layer in range(mask.num_layers):
        table = module.mask_table(module.table_of_layer(layer + 1))
        assert table.row_of_id.data_ptr() % 16 == table.visible_bits.data_ptr() % 16 == 0
        found = table.look_up(torch.from_numpy(token_ids).to(DEVICE))
        expected = mask.visible_sets(layer)[token_ids]
        assert found.experts.dtype == torch.bool
        assert np.array_equal(found.experts.cpu(), expected)
        if mask.min_visible > 1:
            assert found.routable is None
        else:
            assert np.array_equal(found.routable.cpu(), expected.sum(axis=1) > 1)


@pytest.fixture
def mask():
    return make_mask(random_visible_sets(0, 2, 30, 10))


@pytest.fixture
def module(mask) -> VisibleExperts:
    return make_visible_experts(make_config(10, num_layers=2), mask)


@pytest.mark.parametrize(
    ("settings", "pattern", "problem"),
    [
        ({"num_experts": 8}, None, "its number of experts is 10, the model's is 8"),
        ({"num_layers": 3}, None, "it is for 2 MoE layers, the model has 3"),
        ({"num_layers": 6}, "*E*E*E", "it is for 2 MoE layers, the model has 3"),
    ],
    ids=["experts", "layers", "pattern"],
)
def test_mask_that_does_not_fit_is_refused(settings: dict, pattern: str | None, problem: str, mask) -> None:
    config = make_config(**{"num_experts": 10, "num_layers": 2} | settings)
    with pytest.raises(UserError, match=problem):
        VisibleExperts(config, mask, process_groups(), hybrid_layer_pattern=pattern)


@pytest.mark.parametrize("number", [-1, 0, 1, 4, 6])
def test_number_of_no_moe_layer_is_refused(number: int, mask) -> None:
    config = make_config(10, num_layers=4, moe_layer_freq=[0, 1, 1, 0])
    module = make_visible_experts(config, mask)
    assert [module.table_of_layer(layer) for layer in (2, 3)] == [0, 1]
    with pytest.raises(ValueError, match=f"has the number {number}, only 2, 3: .* counting from 1"):
        module.table_of_layer(number)


def test_half_precision_leaves_the_mask_alone(mask) -> None:
    config = make_config(10, num_layers=2, bf16=True, params_dtype=torch.bfloat16)
    module = make_visible_experts(config, mask)
    Float16Module(config, module)
    assert all(buffer.dtype != torch.bfloat16 for buffer in module.buffers())
    token_ids = torch.arange(30, device=DEVICE)
    assert np.array_equal(module.mask_table(1).look_up(token_ids).experts.cpu(), mask.visible_sets(1))


def test_state_dict_round_trip(mask, module: VisibleExperts) -> None:
    state = {name: buffer.clone() for name, buffer in module.state_dict().items()}
    assert state.keys() == {"row_of_id", "visible_bits", "metadata"}
    assert routing_mask_from_buffers(state).digest == mask.digest
    assert np.array_equal(routing_mask_from_buffers(state).visible_sets(1), mask.visible_sets(1))
    make_visible_experts(make_config(10, num_layers=2), mask).load_state_dict(state)


def state_of(visible_sets: np.ndarray) -> dict[str, Tensor]:
    """Return the buffers of a mask of two layers."""
    mask = make_mask(visible_sets, num_layers=2)
    return make_visible_experts(make_config(mask.num_experts, num_layers=2), mask).state_dict()


@pytest.mark.parametrize(
    "other",
    [
        random_visible_sets(1, 2, 30, 10),
        random_visible_sets(0, 2, 31, 10),
        random_visible_sets(0, 2, 30, 9),
        random_visible_sets(0, 1, 30, 10),
    ],
    ids=["sets", "vocabulary", "experts", "layers"],
)
def test_another_mask_is_refused(other: np.ndarray, mask: RoutingMask, module: VisibleExperts) -> None:
    digests = f"{make_mask(other, num_layers=2).digest[:16]}…, this run was given {mask.digest[:16]}…"
    with pytest.raises(UserError, match=digests):
        module.load_state_dict(state_of(other))
    assert routing_mask_from_buffers(module.state_dict()).digest == mask.digest


@pytest.mark.parametrize("name", BUFFERS)
def test_damaged_or_missing_buffers_are_refused(name: str, mask: RoutingMask, module: VisibleExperts) -> None:
    state = {key: buffer.clone() for key, buffer in module.state_dict().items()}
    state[name].flatten()[0] ^= 1
    other = state_of(random_visible_sets(1, 2, 30, 10))
    alone = {name: other[name]}
    for damaged in (state, alone, {key: buffer for key, buffer in other.items() if key != name}):
        for strict in (False, True):
            with pytest.raises(UserError):
                module.load_state_dict(damaged, strict=strict)
    assert routing_mask_from_buffers(module.state_dict()).digest == mask.digest


def test_mask_that_replaces_the_checkpoints_is_kept(mask) -> None:
    """The checkpoint's mask is read with its own shapes and compared; afterwards the module saves its own mask."""
    config, groups = make_config(10, num_layers=2), process_groups()
    replaced, third = (make_mask(random_visible_sets(seed, 2, 30, 10)) for seed in (1, 2))
    module = VisibleExperts(config, mask, groups, replaces=replaced).to(DEVICE)
    own = {name: buffer.clone() for name, buffer in module.state_dict().items()}
    for read, expected in ((True, replaced), (False, mask)):
        tensors = {name: tensor.data for name, tensor in module.sharded_state_dict("").items()}
        assert routing_mask_from_buffers(tensors).digest == expected.digest
        if read:
            with pytest.raises(UserError, match=third.digest[:16]):
                module.load_state_dict(make_visible_experts(config, third).state_dict())
            module.load_state_dict(tensors)
            assert all(torch.equal(buffer, own[name]) for name, buffer in module.state_dict().items())
    # Only one checkpoint is replaced.
    with pytest.raises(UserError, match=replaced.digest[:16]):
        module.load_state_dict(make_visible_experts(config, replaced).state_dict())


def test_one_rank_and_model_chunk_writes_the_mask(mask: RoutingMask) -> None:
    def group(size: int, rank: int) -> SimpleNamespace:
        return SimpleNamespace(size=lambda: size, rank=lambda: rank)

    seen = []
    for pp, vp_stage, tp, dp in product(range(2), range(2), range(2), range(3)):
        groups = SimpleNamespace(pp=group(2, pp), tp=group(2, tp), dp_cp=group(3, dp))
        module = VisibleExperts(make_config(10, num_layers=2), mask, groups, vp_stage)
        tensors = module.sharded_state_dict("routing_mask.")
        assert tensors.keys() == {f"routing_mask.{name}" for name in module.state_dict()}
        (replica_id,) = {tensor.replica_id for tensor in tensors.values()}
        seen.append(replica_id)
    assert len({*seen}) == len(seen)
    assert sum(not any(replica_id) for replica_id in seen) == 1
