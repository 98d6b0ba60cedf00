"""The mean number of experts that tokens use."""

import pytest

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.expert_use import ExpertUse
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import HashLayers


def test_mean_number_of_experts_is_that_of_the_layers_with_experts():
    recipe = MaskRecipe.from_preset("smoe", 8, 4, hash_layers=HashLayers(2, 2, "uniform"))
    mask = build_routing_mask(recipe, vocab_size=50)
    layers = {
        freq: FeedForwardLayers.of_frequency(list(map(int, freq)), len(freq)) for freq in ("1111", "0111", "0011")
    }
    assert ExpertUse.from_mask(mask, 4, layers["1111"]) == ExpertUse(4, 3.0)
    assert ExpertUse.from_mask(mask, 4, layers["0111"]).mean == pytest.approx(10 / 3)
    assert ExpertUse.from_mask(mask, 4, layers["0011"]) == ExpertUse(4, 4.0)
    assert ExpertUse.from_mask(mask, 2, layers["1111"]) == ExpertUse(2, 2.0)
    # A mask with a table for each MoE layer is for the MoE layers in order.
    assert ExpertUse.from_mask(mask, 4, FeedForwardLayers.of_pattern("-E-EE*E")) == ExpertUse(4, 3.0)
    shared = build_routing_mask(MaskRecipe.from_preset("hash", 8, 1, shared_table=True), vocab_size=50)
    assert ExpertUse.from_mask(shared, 4, layers["1111"]) == ExpertUse(4, 1.0)
    assert ExpertUse.from_mask(None, 4, layers["1111"]) == ExpertUse(4, 4)
