"""Small datasets in Megatron's format."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from maskmoe.data.indexed_dataset import IndexedDatasetWriter
from maskmoe.data.tokenizer import TokenizerRecord


def write_documents(
    prefix: Path, documents: Iterable[ArrayLike], dtype: DTypeLike = np.uint16, tokenizer: TokenizerRecord | None = None
) -> Path:
    """Write documents of token ids to `PREFIX.bin` and `PREFIX.idx`, and return the prefix.

    Args:
        prefix: Path of both files without their suffixes.
        documents: The token ids of each document.
        dtype: Type of the ids in the file.
        tokenizer: Recorded beside the dataset if it is given.
    """
    with IndexedDatasetWriter(prefix, np.dtype(dtype), tokenizer) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    return prefix


def frequent_ids(rng: np.random.Generator, vocab_size: int, num_documents: int) -> list[np.ndarray]:
    """Return documents of 20 to 199 ids, drawn with `rng` from Zipf's law with exponent 1.3."""
    return [
        np.minimum(rng.zipf(1.3, size=length), vocab_size) - 1 for length in rng.integers(20, 200, size=num_documents)
    ]


def predictable_ids(rng: np.random.Generator, vocab_size: int, num_documents: int = 30) -> list[np.ndarray]:
    """Return documents in which a model can learn to predict every second id from the one before.

    Args:
        rng: Draws the lengths (50 to 198 ids) and the ids at even positions, by Zipf's law with exponent 1.
        vocab_size: Number of ids.
        num_documents: 30 documents make about 100 samples of 32 tokens.
    """
    documents = zipf_ids(rng, vocab_size, num_documents)
    for ids in documents:
        ids[1::2] = (ids[0::2] * 7 + 3) % vocab_size
    return documents


def zipf_ids(rng: np.random.Generator, vocab_size: int, num_documents: int = 30) -> list[np.ndarray]:
    """Return documents of 50 to 198 ids, drawn with `rng` from Zipf's law with exponent 1."""
    shares = 1 / np.arange(1, vocab_size + 1)
    return [
        rng.choice(vocab_size, size=2 * rng.integers(25, 100), p=shares / shares.sum()) for _ in range(num_documents)
    ]
