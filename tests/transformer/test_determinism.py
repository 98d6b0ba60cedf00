"""Our operations under `torch.use_deterministic_algorithms`, which `--deterministic-mode` switches on.

On a CPU nearly every operation is deterministic, so the tests say most on a GPU.
"""

from collections.abc import Iterator

import pytest
import torch
from support.small_moe import DEVICE, make_config, make_layer, make_mask, random_visible_sets

from maskmoe.transformer.dispatch.rows import RowCopies
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

VOCAB_SIZE, NUM_EXPERTS, SEQUENCE, BATCH, HIDDEN = 40, 8, 32, 4, 16


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "settings", [{"topk": 1}, {"topk": 3}, {"topk": 2, "moe_expert_capacity_factor": 1.0}], ids=str
)
def test_layer_repeats_bit_for_bit(settings, deterministic) -> None:
    config = make_config(NUM_EXPERTS, hidden_size=HIDDEN, moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3, **settings)
    torch.manual_seed(0)
    layer = make_layer(config, make_mask(random_visible_sets(0, 1, VOCAB_SIZE, NUM_EXPERTS)))
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, device=DEVICE, requires_grad=True)
    ids = torch.randint(VOCAB_SIZE, (BATCH, SEQUENCE), device=DEVICE)

    def run() -> list[torch.Tensor]:
        output, _ = layer(hidden, padding_mask=pack_token_ids(TokenIds(ids, None)))
        return [output, *torch.autograd.grad(output.square().sum(), [hidden, *layer.parameters()])]

    assert all(map(torch.equal, run(), run()))


def test_copies_of_rows_repeat_bit_for_bit(deterministic) -> None:
    torch.manual_seed(0)
    copied = torch.rand(64, 8, device=DEVICE) < 0.4
    copies = RowCopies.from_map(copied, int(copied.sum()))
    rows = torch.randn(64, HIDDEN, device=DEVICE, requires_grad=True)

    def run() -> list[torch.Tensor]:
        copy = copies.copy_rows_with_gradient(rows)
        return [copy, *torch.autograd.grad(copy.square().sum(), rows)]

    assert all(map(torch.equal, run(), run()))
    order = torch.randperm(64, device=DEVICE)
    assert torch.equal(RowCopies.permutations(order.unsqueeze(0))[0].order, order.argsort())
