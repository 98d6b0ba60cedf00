"""Megatron's all-to-all dispatcher for any number of selected experts per token."""

import pytest
import torch
from support.small_moe import DEVICE, make_config, make_layer, make_mask, process_groups, random_visible_sets

from maskmoe.transformer.dispatch.stock import MaskMoEAlltoAllTokenDispatcher, StockDispatcher


@pytest.mark.parametrize(("sizes", "counts_rows"), [((1, 4), True), ((2, 4), False), ((3,), False)])
def test_layer_counts_rows_only_where_their_number_varies(sizes: tuple[int, ...], counts_rows: bool) -> None:
    layer = make_layer(make_config(4, topk=2), make_mask(random_visible_sets(0, 1, 30, 4, sizes)))
    layer.dispatcher = StockDispatcher(layer, process_groups())
    assert type(layer.token_dispatcher) is MaskMoEAlltoAllTokenDispatcher
    assert layer.token_dispatcher.counts_rows is counts_rows


@pytest.mark.parametrize("min_visible", [1, 2])
def test_rows_are_sent_for_selected_experts_only(min_visible: int) -> None:
    dispatcher = MaskMoEAlltoAllTokenDispatcher(
        4, list(range(4)), make_config(4, topk=2), process_groups(), min_visible=min_visible
    )
    routing_map = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool, device=DEVICE)
    if min_visible == 2:
        routing_map[1:, 0] = True
    hidden = torch.randn(3, 1, 8, device=DEVICE)
    rows, weights = dispatcher.dispatch_preprocess(hidden, routing_map, routing_map.float())
    assert int(dispatcher.num_out_tokens) == routing_map.sum()
    expected = torch.cat([hidden[routing_map[:, expert], 0] for expert in range(4)])
    assert torch.equal(rows, expected)
    assert torch.equal(weights, torch.ones(len(expected), device=DEVICE))
