import numpy as np
import pytest

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask


@pytest.fixture
def make_frequency():
    """A function that returns token counts of one dataset without a dataset."""

    def make(counts) -> TokenFrequency:
        counts = np.asarray(counts, dtype=np.int64)[None]
        dataset = {"name": "text", "num_tokens": int(counts.sum()), "idx_sha256": "0" * 64, "bin_bytes": 0}
        return TokenFrequency(counts, (None,), (dataset,), None)

    return make


@pytest.fixture
def zipf_frequency(make_frequency):
    """A function that returns Zipf-distributed counts with ids in random order; some ids may never occur."""

    def make(vocab_size: int, num_tokens: int) -> TokenFrequency:
        rng = np.random.default_rng(0)
        probabilities = 1 / np.arange(1, vocab_size + 1)
        counts = rng.multinomial(num_tokens, probabilities / probabilities.sum())
        return make_frequency(rng.permutation(counts))

    return make


@pytest.fixture
def mask(zipf_frequency) -> RoutingMask:
    return build_routing_mask(MaskRecipe(10, 3, "balanced", 0.5, 3, seed=7), frequency=zipf_frequency(200, 5000))
