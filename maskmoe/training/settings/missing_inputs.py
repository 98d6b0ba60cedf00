"""Finds what a run still lacks to start, and the commands that make it."""

import shlex
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

from maskmoe.data.tokenizer import TOKENIZER_TYPES
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

ASSUMED_VOCAB_SIZE = 32_000
"""The number of ids that the report assumes if neither a tokenizer nor a flag nor a mask says it."""

_TOKENIZER = "SentencePieceTokenizer"
_TOKENIZER_PREFIX, _DATASET_PREFIX, _COUNTS = "tokenizer", "dataset", "counts.safetensors"
_DATASET = f"{_DATASET_PREFIX}_text_document"  # `maskmoe preprocess` appends the key of the text


class MissingInput(NamedTuple):
    """An input that the command line does not name.

    Attributes:
        what: tokenizer, dataset or routing mask.
        flags: the flags that would name the input.
        commands: the command lines that make the input; none if no command of `maskmoe` makes it.
    """

    what: str
    flags: str
    commands: tuple[str, ...]

    def __str__(self) -> str:
        made_by = f", made by: {' && '.join(self.commands)}" if self.commands else ""
        return f"no {self.what}: pass {self.flags}{made_by}"


def missing_tokenizer(args: Namespace) -> Iterator[MissingInput]:
    """Yield the tokenizer if the command line does not name one.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    if args.tokenizer_type is None:
        size = args.vocab_size or ASSUMED_VOCAB_SIZE
        words = ("tokenizer", "--input", "TEXT.jsonl", "--vocab-size", size, "--output-prefix", _TOKENIZER_PREFIX)
        yield MissingInput(
            "tokenizer", f"--tokenizer-type {_TOKENIZER} --tokenizer-model {_TOKENIZER_PREFIX}.model", (_line(*words),)
        )


def missing_dataset(args: Namespace) -> Iterator[MissingInput]:
    """Yield the dataset if the command line does not name one.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    if names_dataset(args):
        return
    tokenizer_type = args.tokenizer_type or _TOKENIZER
    if tokenizer_type not in TOKENIZER_TYPES:
        # `maskmoe preprocess` does not know Megatron's other tokenizers.
        yield MissingInput(
            "dataset", f"--data-path with a dataset that was made with {tokenizer_type}, or --mock-data", ()
        )
        return
    model = args.tokenizer_model or (f"{_TOKENIZER_PREFIX}.model" if args.tokenizer_type is None else "MODEL")
    words = ("preprocess", "--input", "TEXT.jsonl", "--tokenizer-type", tokenizer_type, "--tokenizer-model", model)
    words += ("--output-prefix", _DATASET_PREFIX, "--append-eod")
    yield MissingInput("dataset", f"--data-path {_DATASET} --split 99,1,0", (_line(*words),))


def missing_mask(args: Namespace, vocab_size: int | None, has_checkpoint: bool) -> Iterator[MissingInput]:
    """Yield the routing mask if the run has experts, and neither the command line nor a checkpoint has a mask.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        vocab_size: the number of ids of the tokenizer; None if it is unknown.
        has_checkpoint: whether the run loads a checkpoint, which holds a routing mask.
    """
    if args.num_experts and args.routing_mask is None and not has_checkpoint:
        size = vocab_size or args.vocab_size or ASSUMED_VOCAB_SIZE
        data_path = args.data_path or [_DATASET]
        count = ("count", "--data-path", *data_path, "--vocab-size", size, "--output", _COUNTS)
        yield MissingInput("routing mask", "--routing-mask mask.safetensors", (_line(*count), _mask_command(args)))


def names_dataset(args: Namespace) -> bool:
    """Return whether the command line names a dataset, or asks for mock data."""
    paths = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
    return any((*paths, args.data_args_path, args.per_split_data_args_path, args.mock_data))


def _mask_command(args: Namespace) -> str:
    """Return the command that makes a routing mask for the model, with values that suit its number of experts."""
    num_layers = "L"
    if args.hybrid_layer_pattern is not None or args.num_layers:
        num_layers = len(FeedForwardLayers.of_args(args).has_experts)
    visible = min(args.num_experts, 4 * args.moe_router_topk)
    words = ("mask", "--token-frequency", _COUNTS, "--num-experts", args.num_experts, "--num-layers", num_layers)
    words += ("--frequent-mass", 0.4, "--frequent-visible-experts", visible, "--assignment", "balanced")
    return _line(*words, "--output", "mask.safetensors")


def _line(*words: object) -> str:
    return shlex.join(["maskmoe", *map(str, words)])
