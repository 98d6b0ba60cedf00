"""Megatron's dispatchers for any number of selected experts per token."""

import pytest
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from support.small_moe import make_config, make_layer, make_mask, process_groups, random_visible_sets

from maskmoe.transformer.dispatch.stock import MaskMoEAlltoAllTokenDispatcher, StockDispatcher


@pytest.mark.parametrize(("sizes", "counts_rows"), [((1, 4), True), ((2, 4), False), ((3,), False)])
def test_layer_counts_rows_only_where_their_number_varies(sizes: tuple[int, ...], counts_rows: bool) -> None:
    layer = make_layer(make_config(4, topk=2), make_mask(random_visible_sets(0, 1, 30, 4, sizes)))
    layer.dispatcher = StockDispatcher(layer, process_groups())
    assert type(layer.token_dispatcher) is MaskMoEAlltoAllTokenDispatcher
    assert layer.token_dispatcher.counts_rows is counts_rows


def test_all_gather_does_not_permute_by_transformer_engine() -> None:
    """The fused permutation fails if no gathered token uses an expert of the rank."""
    config = make_config(4, topk=2, moe_token_dispatcher_type="allgather")
    layer = make_layer(config, make_mask(random_visible_sets(0, 1, 30, 4)))
    layer.config.moe_permute_fusion = True  # the configuration would refuse the setting without Transformer Engine
    layer.dispatcher = StockDispatcher(layer, process_groups())
    assert type(layer.token_dispatcher) is MoEAllGatherTokenDispatcher
    assert not layer.token_dispatcher.config.moe_permute_fusion
    assert layer.config.moe_permute_fusion
