import numpy as np
import pytest
from support.datasets import frequency_of

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask


@pytest.fixture
def zipf_frequency():
    """A function that returns Zipf-distributed counts with ids in random order; some ids may never occur."""

    def make(vocab_size: int, num_tokens: int) -> TokenFrequency:
        rng = np.random.default_rng(0)
        probabilities = 1 / np.arange(1, vocab_size + 1)
        counts = rng.multinomial(num_tokens, probabilities / probabilities.sum())
        return frequency_of(rng.permutation(counts))

    return make


@pytest.fixture
def mask(zipf_frequency) -> RoutingMask:
    return build_routing_mask(MaskRecipe(10, 3, "balanced", 0.5, 3, seed=7), frequency=zipf_frequency(200, 5000))
