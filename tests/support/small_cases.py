"""Makes small routing masks, choices of experts, and datasets."""

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from maskmoe.analysis.dispatch_cost.routing import Choice, VisibleTable
from maskmoe.data.indexed_dataset import IndexedDatasetWriter
from maskmoe.routing_mask import MaskRecipe, RoutingMask, TokenFrequency, build_routing_mask, count_token_frequency
from maskmoe.routing_mask.mask import MaskProvenance

VOCAB_SIZE = 100


def make_table(visible: np.ndarray) -> VisibleTable:
    """Return the table of visible sets, bool [vocab, N]."""
    vocab_size, num_experts = visible.shape
    return VisibleTable(np.arange(vocab_size), np.nonzero(visible)[1], visible.sum(axis=1), num_experts)


def mask_of(visible: np.ndarray) -> RoutingMask:
    """Return the mask of one layer with these visible sets, bool [vocab, N]."""
    vocab_size, num_experts = visible.shape
    is_single = visible.sum(axis=1) == 1
    rows = np.concatenate([np.eye(num_experts, dtype=bool), visible | is_single[:, None]])
    row_of_id = np.where(is_single, visible.argmax(axis=1), num_experts + np.arange(vocab_size))
    bits = np.packbits(rows, axis=1, bitorder="little")
    provenance = MaskProvenance("uniform", 0.5, 2, seed=0)
    return RoutingMask(row_of_id[None].astype(np.int16), bits[None], vocab_size, num_experts, 1, provenance)


@st.composite
def tables(draw, rank_local: bool = False) -> tuple[VisibleTable, np.ndarray, int]:
    """Draw a table, its visible sets, bool [vocab, N], and a number of ranks."""
    num_ranks, experts_per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_experts, vocab_size = num_ranks * experts_per_rank, draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    visible = rng.random((vocab_size, num_experts)) < rng.random((vocab_size, 1))
    visible[np.arange(vocab_size), rng.integers(num_experts, size=vocab_size)] = True
    if rank_local:
        home = rng.integers(num_ranks, size=(vocab_size, 1))
        visible &= np.arange(num_experts) // experts_per_rank == home
        visible[np.arange(vocab_size), home[:, 0] * experts_per_rank] = True
    return make_table(visible), visible, num_ranks


def selected_experts(choices: list[Choice]) -> dict[int, list[int]]:
    """Return the experts of each token; fail if a token is in two choices."""
    selected: dict[int, list[int]] = {}
    for choice in choices:
        for token, experts in zip(choice.tokens.tolist(), choice.experts.T.tolist(), strict=True):
            assert token not in selected
            selected[token] = experts
    return selected


def write_data(folder: Path, num_tokens: int = 3000) -> Path:
    """Write a dataset of Zipf-distributed ids in several documents and return its prefix."""
    rng = np.random.default_rng(0)
    probabilities = 1 / np.arange(1, VOCAB_SIZE + 1)
    token_ids = rng.choice(VOCAB_SIZE, num_tokens, p=probabilities / probabilities.sum())
    with IndexedDatasetWriter(folder / "text", np.uint16) as dataset:
        for document in np.split(token_ids, 4):
            dataset.add_document(document)
    return folder / "text"


def count(prefix: Path) -> TokenFrequency:
    """Count the ids of a dataset."""
    return count_token_frequency([str(prefix)], VOCAB_SIZE, workers=1)


def make_mask(frequency: TokenFrequency, num_experts: int, frequent_visible: int, num_layers: int = 1) -> RoutingMask:
    """Build a balanced mask in which frequent ids cover 40 % of all occurrences."""
    recipe = MaskRecipe(num_experts, num_layers, "balanced", 0.4, frequent_visible, seed=1)
    return build_routing_mask(recipe, frequency=frequency, workers=1)
