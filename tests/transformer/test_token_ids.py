"""Packing of token ids, padding and plan, and their transport through recomputation."""

import pytest
import torch
from megatron.core import tensor_parallel
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.transformer.token_ids import (
    DispatchPlan,
    TokenIds,
    from_arguments,
    gather_sequence,
    pack_token_ids,
    to_arguments,
    unpack_token_ids,
)

IDS = torch.arange(6, device=DEVICE).view(2, 3)
IS_PADDING = IDS > 3
PLAN: DispatchPlan = {}


class WithoutIds(torch.nn.Module):
    """A block as Megatron-Core 0.19 has it: ids travel on `padding_mask`."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> None: ...


class WithIds(torch.nn.Module):
    """A block of a later Megatron-Core, which hands ids to its layers."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None, input_ids: Tensor | None = None) -> None: ...


every_block = pytest.mark.parametrize("block", [WithoutIds, WithIds])


def through(block: type[torch.nn.Module], token_ids: TokenIds) -> TokenIds | None:
    """Hand token ids to the layers of a block."""
    return from_arguments(**{"padding_mask": None, "input_ids": None} | to_arguments(token_ids, block))


@every_block
@pytest.mark.parametrize("is_padding", [None, IS_PADDING], ids=["no padding", "padding"])
@pytest.mark.parametrize("plan", [None, PLAN], ids=["no plan", "plan"])
def test_round_trip(block: type[torch.nn.Module], is_padding: Tensor | None, plan: DispatchPlan | None) -> None:
    found = through(block, TokenIds(IDS, is_padding, plan))
    assert found is not None
    assert torch.equal(found.ids, IDS)
    assert type(found.ids) is Tensor
    assert found.plan is plan
    if is_padding is None:
        assert found.is_padding is None
        assert found.is_real is None
    else:
        assert torch.equal(found.is_padding, is_padding)
        assert found.is_real.tolist() == [True, True, True, True, False, False]
    in_layer = found.transpose()
    assert torch.equal(in_layer.ids, IDS.T)
    assert in_layer.plan is plan


def test_padding_of_a_layer_may_be_integers() -> None:
    found = from_arguments(IS_PADDING.int(), IDS)
    assert found is not None
    assert torch.equal(found.is_real, ~IS_PADDING.flatten())


@every_block
@pytest.mark.parametrize("is_padding", [None, IS_PADDING], ids=["no padding", "padding"])
def test_plan_survives_recomputation(block: type[torch.nn.Module], is_padding: Tensor | None) -> None:
    """Megatron-Core saves the tensors, and hands detached ones to the layers that run again."""
    seen = []

    def layer(hidden: Tensor, padding_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        seen.append(from_arguments(padding_mask, input_ids))
        return hidden * 2

    hidden = torch.ones(2, 3, device=DEVICE, requires_grad=True)
    arguments = {"padding_mask": None, "input_ids": None} | to_arguments(TokenIds(IDS, is_padding, PLAN), block)
    tensor_parallel.checkpoint(layer, False, hidden, *arguments.values()).sum().backward()
    assert len(seen) == 2
    assert all(token_ids.plan is PLAN for token_ids in seen)
    assert all(torch.equal(token_ids.ids, IDS) for token_ids in seen)


@pytest.mark.parametrize("has_padding", [False, True])
def test_the_parts_of_tensor_parallel_ranks_are_gathered(monkeypatch, has_padding: bool) -> None:
    ids = torch.arange(8, device=DEVICE).view(2, 4)
    packed = pack_token_ids(TokenIds(ids, ids > 5 if has_padding else None))
    parts = packed.chunk(2, dim=-1)

    def gather(sequence_first: Tensor, group: None) -> Tensor:
        assert torch.equal(sequence_first, parts[0].movedim(-1, 0))
        return torch.cat([part.movedim(-1, 0) for part in parts])

    monkeypatch.setattr("maskmoe.transformer.token_ids.gather_from_sequence_parallel_region", gather)
    assert torch.equal(gather_sequence(parts[0], None), packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed.roll(-1, dims=-1),
        lambda packed: packed.clone(),
        lambda packed: packed[:, :2],
        lambda packed: packed + 1,
        lambda packed: torch.stack([packed, packed])[0],
    ],
    ids=["roll", "clone", "slice", "add", "stack"],
)
def test_other_ids_have_no_plan(change) -> None:
    """A plan fits the very ids that it was made from; multi-token prediction shifts them, for example."""
    changed = change(pack_token_ids(TokenIds(IDS, plan=PLAN)))
    assert type(changed) is Tensor
    assert unpack_token_ids(changed).plan is None
