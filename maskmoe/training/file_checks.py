"""Checks of the files that a run names, made before any compute is spent: tokenizer, mask, datasets, save folder."""

import hashlib
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from tqdm import tqdm

from maskmoe.data.indexed_dataset import DatasetIndex, open_tokens, read_index, read_tokenizer_record
from maskmoe.data.tokenizer import TOKENIZER_TYPES, TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import parse_data_path
from maskmoe.routing_mask.mask import RoutingMask

_CHUNK_TOKENS = 1 << 24
_PARTS = ("training", "validation", "test")


def check_tokenizer(args: Namespace) -> None:
    """Check that the flags describe a tokenizer that exists on this machine.

    Megatron itself reports such mistakes with a traceback.

    Raises:
        UserError: the type, or the vocabulary size that the type needs, is missing, or the tokenizer's model does not
            exist.
    """
    if args.tokenizer_type is None:
        raise UserError("--tokenizer-type is missing")
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise UserError("--tokenizer-type NullTokenizer needs --vocab-size")
    if args.tokenizer_type not in TOKENIZER_TYPES or args.tokenizer_model is None:
        return
    if not Path(args.tokenizer_model).exists():
        raise UserError(f"--tokenizer-model {args.tokenizer_model} does not exist")
    if args.tokenizer_type == "SentencePieceTokenizer" and not Path(args.tokenizer_model).is_file():
        raise UserError(f"--tokenizer-model {args.tokenizer_model} is not a file")


def check_save_folder(args: Namespace) -> None:
    """Check that checkpoints can be written to `--save`.

    Without this check a run would fail only when its first checkpoint is due.

    Raises:
        UserError: the folder in `--save` is not writable, and cannot be made.
    """
    if args.save is None:
        return
    folder = Path(args.save).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--save {args.save}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--save {args.save}: no permission to write in {existing}")


def check_mask(args: Namespace, mask: RoutingMask) -> None:
    """Check that the routing mask fits the model, the layout and the tokenizer.

    Args:
        args: parsed arguments; Megatron's tokenizer has been built from them.
        mask: the routing mask of the run.

    Raises:
        UserError: a size or the tokenizer differs; the message names both values.
    """
    vocab_size = current_vocab_size()
    if args.routing_mask is None and vocab_size < mask.vocab_size <= args.padded_vocab_size:
        # The mask comes from a checkpoint of an imported model, whose embedding may have more rows than its tokenizer
        # has ids.
        vocab_size = mask.vocab_size
    mask.check_fits(
        vocab_size=vocab_size,
        num_experts=args.num_experts,
        num_layers=args.num_layers + (args.mtp_num_layers or 0),
        # A rank-local mask works with any layout; its expert-parallel size matters only for the speed of training.
        expert_model_parallel_size=None if args.skip_train else args.expert_model_parallel_size,
    )
    if mask.provenance.tokenizer is not None:
        _check_same_tokenizer(args, mask.provenance.tokenizer, "the routing mask's token counts were")


def check_data(args: Namespace, mask: RoutingMask | None) -> None:
    """Check every dataset of the run.

    A dataset must be complete, made with the tokenizer of the run, and hold no token id beyond the vocabulary. Before
    training, the datasets must also have all the parts that training reads. The ids of a dataset whose counts are in
    the mask were checked when the mask was made. The first rank of each node reads every other dataset once.

    Args:
        args: arguments that Megatron has validated.
        mask: the routing mask; None for a model without experts.

    Raises:
        UserError: a dataset is unusable; the message names the file.
    """
    is_first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
    for error in data_errors(args, mask, current_vocab_size(), math.inf if is_first_of_node else 0):
        raise UserError(error)


def current_vocab_size() -> int:
    """Return the number of ids of the tokenizer that Megatron has built for this process."""
    tokenizer = get_tokenizer()
    assert tokenizer is not None
    return tokenizer.vocab_size


def data_errors(
    args: Namespace, mask: RoutingMask | None, vocab_size: int | None, most_bytes_read: float
) -> Iterator[str]:
    """Yield an error for every fault of the datasets of the run; `check_data` says what is checked.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        mask: the routing mask; None if there is none, or none that can be read.
        vocab_size: number of ids of the tokenizer; None if the number is unknown. Then no token ids are read.
        most_bytes_read: the size, in bytes, up to which the token ids of a dataset are read.
    """
    try:
        _check_data_paths(args)
    except UserError as error:
        yield str(error)
        return
    are_readable = True
    for prefix in dict.fromkeys(data_prefixes(args)):
        try:
            index = read_index(prefix)
            _check_dataset_tokenizer(args, prefix)
            if vocab_size is not None and not was_counted(index, mask) and index.bin_bytes <= most_bytes_read:
                _check_token_ids(prefix, vocab_size)
        except UserError as error:
            yield str(error)
            are_readable = False
    if are_readable and not args.skip_train:
        try:
            _check_parts(args)
        except UserError as error:
            yield str(error)


def was_counted(dataset: DatasetIndex, mask: RoutingMask | None) -> bool:
    """Return whether the routing mask was made from counts of this dataset, which checked all its token ids."""
    counted = mask.provenance.datasets if mask else ()
    return any(
        (entry["idx_sha256"], entry["bin_bytes"]) == (dataset.idx_sha256, dataset.bin_bytes) for entry in counted
    )


def data_prefixes(args: Namespace) -> Iterator[str]:
    """Yield the prefixes of all datasets of the run; a prefix may come more than once."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for part in [blend, *(blend_per_split or [])]:
        if part is not None:
            yield from part[0]


def _check_dataset_tokenizer(args: Namespace, prefix: str) -> None:
    """Check that a dataset, if it records its tokenizer, was made with the tokenizer of the run. Raises UserError."""
    record = read_tokenizer_record(prefix)
    if record is not None:
        _check_same_tokenizer(args, record, f"dataset {prefix} was")


def _check_data_paths(args: Namespace) -> None:
    """Check that the flags name datasets, in a form that can be read. Raises UserError."""
    paths = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    for path in paths:
        if path is not None:
            parse_data_path(path)
    files = [args.data_args_path, args.per_split_data_args_path]
    if all(source is None for source in paths + files) and not args.mock_data:
        raise UserError("no dataset: pass --data-path PREFIX, made by tools/preprocess_data.py")


def _check_parts(args: Namespace) -> None:
    """Check that the datasets have the parts that training asks for.

    Megatron would end at once, as if training were complete, without training data. It would fail at the first
    evaluation without validation data. It would draw samples for ever from a part that has a share but no tokens.

    Raises:
        UserError: a part is missing or has no tokens.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is not None:
        parts = _bounds_of_parts(args.split)
    elif blend_per_split is not None:
        parts = blend_per_split
    else:
        return
    validates = args.full_validation or args.eval_iters > 0
    for name, part, is_needed in zip(_PARTS, parts, (True, validates, False), strict=True):
        if part is None and is_needed:
            hint = " or pass --eval-iters 0" if name == "validation" else ""
            raise UserError(f"there are no {name} data; give them a share in --split or a path of their own{hint}")
    if blend is not None:
        for prefix in blend[0]:
            _check_split(prefix, args.split)


def _bounds_of_parts(split: str) -> Sequence[tuple[float, float] | None]:
    """Return where each of `_PARTS` begins and ends in a dataset, as shares of it; None for a part without a share."""
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


def _check_split(prefix: str, split: str) -> None:
    """Check that every part that has a share of a dataset also has tokens. Raises UserError."""
    lengths = read_index(prefix).sequence_lengths
    for name, part in zip(_PARTS, _bounds_of_parts(split), strict=True):
        if part is None:
            continue
        first, last = (round(bound * len(lengths)) for bound in part)
        if not lengths[first:last].any():
            raise UserError(
                f"dataset {prefix}: --split {split} leaves the {name} part no tokens, because the split assigns whole "
                f"documents and the dataset has {len(lengths)}; give the part a share of 0, or a larger share"
            )


def tokenizer_sha256(args: Namespace) -> str | None:
    """Return the SHA-256 digest of the file that `--tokenizer-model` names.

    The digest is None for a type of tokenizer that the tools of this package do not make.
    """
    if args.tokenizer_type not in TOKENIZER_TYPES or args.tokenizer_model is None:
        return None
    path = Path(args.tokenizer_model)
    path = path / "tokenizer.json" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_same_tokenizer(args: Namespace, made_with: TokenizerRecord, what: str) -> None:
    """Check that a file was made with the tokenizer of the run.

    Args:
        args: arguments with `tokenizer_sha256`.
        made_with: the record of the tokenizer that the file was made with.
        what: subject and auxiliary verb of the error, such as "dataset data/web was".

    Raises:
        UserError: the tokenizers differ.
    """
    if args.tokenizer_sha256 not in (None, made_with.sha256):
        raise UserError(
            f"{what} made with another tokenizer ({made_with.model}, {made_with.vocab_size} ids, "
            f"sha256 {made_with.sha256[:12]}…) than --tokenizer-model {args.tokenizer_model}"
        )


def _check_token_ids(prefix: str, vocab_size: int) -> None:
    """Check that every token id of a dataset is in the vocabulary. Raises UserError."""
    tokens = open_tokens(prefix)
    # As an unsigned number, a negative id is larger than any vocabulary.
    unsigned = tokens.view(f"u{tokens.dtype.itemsize}")
    starts = range(0, len(tokens), _CHUNK_TOKENS)
    for start in tqdm(starts, desc=f"checking {Path(prefix).name}", unit="chunk", disable=len(starts) < 64):
        chunk = unsigned[start : start + _CHUNK_TOKENS]
        if chunk.size and int(chunk.max()) >= vocab_size:
            position = start + int(np.argmax(chunk >= vocab_size))
            raise UserError(
                f"dataset {prefix} holds token id {tokens[position]} at position {position}, but the tokenizer has "
                f"{vocab_size} ids; it was made with another tokenizer"
            )
