"""Copy a dataset with its documents in a random order."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.data.indexed_dataset import IndexedDatasetWriter, open_tokens, read_index

_BATCH_TOKENS = 1 << 20


def copy_shuffled(source: str | Path, writer: IndexedDatasetWriter, seed: int) -> None:
    """Append all documents of a dataset to `writer` in an order that depends only on `seed` and their number.

    Datasets with the same number of documents are therefore shuffled alike. The tokens are read through a memory map,
    so memory holds about a million tokens, or the largest document, and a few integers for each document.

    Args:
        source: Prefix of the dataset to copy. Each document is at most one sequence.
        writer: An open writer of the copy.
        seed: Seed of the order, not negative.

    Raises:
        ValueError: A document has several sequences.
        UserError: The dataset is damaged or has no tokens.
    """
    index, tokens = read_index(source), np.asarray(open_tokens(source))
    if (np.diff(index.document_indices) > 1).any():
        raise ValueError(f"dataset {source} has documents of several sequences, which cannot be shuffled")
    boundaries = index.document_boundaries
    order = np.random.default_rng(seed).permutation(len(boundaries) - 1)
    lengths = np.diff(boundaries)[order]
    # A batch ends after the document that fills up another million tokens.
    batch_ends = np.flatnonzero(np.diff(np.cumsum(lengths) // _BATCH_TOKENS)) + 1
    with tqdm(total=len(order), unit="document", unit_scale=True, desc="shuffling", disable=None) as bar:
        for documents in np.split(order, batch_ends):
            starts, ends = boundaries[documents].tolist(), boundaries[documents + 1].tolist()
            parts = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
            writer.add_documents(np.concatenate(parts), np.array([len(part) for part in parts]))
            bar.update(len(documents))
