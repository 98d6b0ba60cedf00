"""Small datasets in Megatron's format, and routing masks that are built from their token counts."""

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import ArrayLike, DTypeLike
from support.paths import ROOT

from maskmoe.data.dataset_writing import IndexedDatasetWriter, optimal_dtype
from maskmoe.data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerRecord
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, count_token_frequency
from maskmoe.routing_mask.mask import RoutingMask


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
            writer.add_documents(np.asarray(document), np.array([len(document)]))
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
    shares = 1 / np.arange(1, vocab_size + 1)
    documents = [
        rng.choice(vocab_size, size=2 * rng.integers(25, 100), p=shares / shares.sum()) for _ in range(num_documents)
    ]
    for ids in documents:
        ids[1::2] = (ids[0::2] * 7 + 3) % vocab_size
    return documents


FILL_IN_MIDDLE_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<|endoftext|>")


def write_character_tokenizer(folder: Path, vocab_size: int, special: Sequence[str] = FILL_IN_MIDDLE_TOKENS) -> Path:
    """Write a tokenizer for Megatron's HuggingFaceTokenizer and return its folder.

    Each id is one character, so a text can be cut anywhere and keeps its ids. The last ids are special tokens.

    Args:
        folder: Is made.
        vocab_size: Number of ids.
        special: The special tokens; the last one ends a document.
    """
    characters = [chr(0x4E00 + number) for number in range(vocab_size - len(special))]
    vocabulary = {token: number for number, token in enumerate([*characters, *special])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=characters[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def count_ids(prefix: Path, vocab_size: int) -> TokenFrequency:
    """Count the token ids of one dataset."""
    return count_token_frequency([str(prefix)], vocab_size, workers=1)


def build_mask(
    frequency: TokenFrequency,
    num_experts: int,
    num_layers: int,
    assignment: str = "balanced",
    *,
    frequent_mass: float = 0.4,
    frequent_visible_experts: int | None = 4,
    seed: int = 1,
    expert_model_parallel_size: int | None = None,
) -> RoutingMask:
    """Build a routing mask; arguments as for `MaskRecipe`."""
    recipe = MaskRecipe(
        num_experts,
        num_layers,
        assignment,
        frequent_mass,
        frequent_visible_experts,
        seed=seed,
        expert_model_parallel_size=expert_model_parallel_size,
    )
    return build_routing_mask(recipe, frequency=frequency, workers=1)


def write_inputs(
    folder: Path, vocab_size: int, num_experts: int, num_layers: int, tokenizer: Tokenizer | None = None
) -> RoutingMask:
    """Write a text, a SentencePiece tokenizer for it, a dataset, token counts and a routing mask, which is returned.

    Args:
        folder: Gets the files.
        vocab_size: Number of ids.
        num_experts: Number of experts of the mask.
        num_layers: Number of layers of the mask.
        tokenizer: Encodes the dataset instead of the SentencePiece tokenizer.
    """
    text = "\n".join(path.read_text() for path in sorted((ROOT / "maskmoe/routing_mask").glob("*.py")))
    (folder / "text.txt").write_text(text)
    (folder / "tokenizer.model").write_bytes(train_tokenizer([text], vocab_size=vocab_size, num_threads=1))
    tokenizer = tokenizer or SentencePieceTokenizer(folder / "tokenizer.model")
    documents = [np.append(ids, tokenizer.eod_id) for ids in tokenizer.encode_batch(text.split("\n\n"))]
    write_documents(folder / "data", documents, optimal_dtype(vocab_size), tokenizer.record())
    frequency = count_ids(folder / "data", vocab_size)
    frequency.save(folder / "counts.safetensors")
    mask = build_mask(frequency, num_experts, num_layers, "uniform", frequent_mass=0.6, frequent_visible_experts=3)
    mask.save(folder / "mask.safetensors")
    return mask


def frequency_of(counts: ArrayLike, tokenizer: TokenizerRecord | None = None) -> TokenFrequency:
    """Return token counts of one dataset, without a dataset."""
    counts = np.array(counts, np.int64)[None]
    dataset = {"name": "text", "num_tokens": int(counts.sum()), "idx_sha256": "0" * 64, "bin_bytes": 0}
    return TokenFrequency(counts, (None,), (dataset,), tokenizer)


def covering_ids(counts: ArrayLike, mass: float) -> set[int]:
    """Return the shortest prefix of the ids by descending count, then by id, that covers a share of whole counts."""
    counts = np.array(counts, np.int64).tolist()
    order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    length = 0
    while sum(counts[token] for token in order[:length]) < Fraction(str(mass)) * sum(counts):
        length += 1
    return set(order[:length])
