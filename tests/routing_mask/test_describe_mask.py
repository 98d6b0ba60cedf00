"""Masks in words."""

import pytest

from maskmoe.routing_mask import MaskRecipe, RoutingMask, build_routing_mask
from maskmoe.routing_mask.assignment import HashLayers
from maskmoe.routing_mask.describe_mask import describe_visible_experts

HASH = HashLayers(num_layers=1, visible_experts=2, assignment="uniform")


def preset(name: str, **settings) -> RoutingMask:
    return build_routing_mask(MaskRecipe.from_preset(name, 8, 3, **settings), vocab_size=50)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (preset("smoe"), "every id sees all 8 experts"),
        (preset("hash"), "every id sees 1 of 8 experts"),
        (preset("top-k-hash", frequent_visible_experts=3), "every id sees 3 of 8 experts"),
        (
            preset("smoe", hash_layers=HASH),
            "in the first layer, every id sees 2 of 8 experts; after that, every id sees all 8 experts",
        ),
    ],
)
def test_alike_ids(mask, words):
    assert describe_visible_experts(mask) == words


def test_frequent_ids(zipf_frequency):
    frequency = zipf_frequency(200, 5000)
    mask = build_routing_mask(MaskRecipe(10, 3, "balanced", 0.5, 3, seed=7), frequency=frequency)
    number = int((mask.num_visible_of_layer(0) == 3).sum())
    assert 1 < number < 200
    expected = f"{number} of 200 ids see 3 of 10 experts; every other id sees 1 expert"
    assert describe_visible_experts(mask) == expected
    no_frequent_ids = build_routing_mask(MaskRecipe(10, 3, "balanced", 0.0, seed=7), frequency=frequency)
    assert describe_visible_experts(no_frequent_ids) == "every id sees 1 of 10 experts"
