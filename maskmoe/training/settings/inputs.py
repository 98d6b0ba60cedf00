"""Checks of the files that a run names, made before any compute is spent: tokenizer, mask, datasets, save folder."""

import math
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets import blended_megatron_dataset_config as dataset_config
from megatron.training.utils import get_blend_and_blend_per_split

from maskmoe.checkpoint.read_routing_mask import has_expert_tables, mask_in_checkpoint, read_routing_mask
from maskmoe.data.indexed_dataset import DatasetIndex, bin_path, read_index
from maskmoe.data.tokenizer_record import TOKENIZER_TYPES, TokenizerRecord, read_tokenizer_record, tokenizer_sha256
from maskmoe.errors import UserError, megatrons_checks, refused_by_system
from maskmoe.files.outputs import refuse_checkpoint
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.processes.console import progress_bar
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import check_same_mask

_CHUNK_TOKENS = 1 << 20
# Types whose model is a file or folder on this machine, or that need no model but must not be given a missing one.
_LOCAL_TOKENIZERS = {"NullTokenizer", "TikTokenizer", *TOKENIZER_TYPES}


def check_tokenizer(args: Namespace, checkpoint: Path | None) -> str | None:
    """Check that the flags describe a tokenizer that exists here, and return the SHA-256 digest of its file.

    Megatron would look for a missing tokenizer on the internet. The digest is None for a type that MaskMoE's tools do
    not make.

    Raises:
        UserError: No tokenizer is named, or the model does not exist or is damaged.
    """
    if args.tokenizer_type is None:
        cure = "--use-checkpoint-args takes the checkpoint's" if checkpoint else "maskmoe tokenizer makes one"
        raise UserError(f"no tokenizer: pass --tokenizer-type and --tokenizer-model; {cure}")
    if args.tokenizer_type not in _LOCAL_TOKENIZERS or args.tokenizer_model is None:
        return None
    model = Path(args.tokenizer_model)
    if not model.exists():
        raise UserError(f"--tokenizer-model {model} does not exist")
    return tokenizer_sha256(args.tokenizer_type, model)


def check_save_folder(args: Namespace) -> None:
    """Raise `UserError` if no checkpoints can be written to `--save`, which Megatron finds only when it saves."""
    if args.save is None:
        return
    folder = Path(args.save).absolute()
    refuse_checkpoint(folder)
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with refused_by_system(f"--save {args.save}: cannot write in {existing}"):
        tempfile.TemporaryFile(dir=existing).close()


# ---- The routing mask ------------------------------------------------------------------------------------------------


def find_routing_mask(args: Namespace, checkpoint: Path | None, report: Callable[[str], None]) -> RoutingMask | None:
    """Return the routing mask in `--routing-mask` or, without the flag, of the checkpoint; None without experts.

    `report` takes a line about the change of masks with `--change-routing-mask`, and about a mask for another top-k.

    Raises:
        UserError: There is no mask. Or the masks of the flag and of the checkpoint differ although the arguments lack
            `--change-routing-mask`, or in their sizes.
    """
    if not args.num_experts:
        return None
    sources = [source for source in (args.routing_mask, checkpoint) if source is not None]
    if not sources:
        raise UserError("no routing mask: pass --routing-mask with a file that maskmoe mask makes")
    own = read_routing_mask(sources[0])
    of_checkpoint = own if len(sources) == 1 else _mask_of_checkpoint(args, sources[1])
    is_same = of_checkpoint is not None and own.digest == of_checkpoint.digest
    if not args.change_routing_mask and of_checkpoint is not None:
        cure = "; pass --change-routing-mask to change visible experts on purpose" if not args.skip_train else ""
        check_same_mask(own.digest, of_checkpoint.digest, cure)
    elif is_same:
        report(
            "routing mask: --change-routing-mask changes nothing, no checkpoint with another mask than "
            f"{own.digest[:16]}… is loaded"
        )
    else:
        replaced = f"{of_checkpoint.digest[:16]}… of the checkpoint" if of_checkpoint else "none in the checkpoint"
        report(f"routing mask: {replaced} → {own.digest[:16]}…")
    topk, made_for = args.moe_router_topk, own.provenance
    is_new = checkpoint is None or not is_same
    if is_new and not args.skip_train and made_for.assignment == "balanced" and made_for.topk != topk:
        report(
            f"routing mask: it balances the load of the experts at top-{made_for.topk}; for --moe-router-topk {topk}, "
            f"make it by maskmoe mask --moe-router-topk {topk}"
        )
    return own


def _mask_of_checkpoint(args: Namespace, checkpoint: Path) -> RoutingMask | None:
    """Return the mask of a checkpoint; None if the checkpoint holds Megatron-Core's own model.

    Raises:
        UserError: The checkpoint holds no routing mask, and the run may not add one or weighs experts differently.
    """
    mask = mask_in_checkpoint(checkpoint)
    if mask is not None:
        return mask
    if not args.change_routing_mask:
        cure = "pass --change-routing-mask to continue it with the mask of --routing-mask"
        raise UserError(f"{checkpoint} holds no routing mask: it is not a checkpoint of MaskMoE; {cure}")
    if has_expert_tables(checkpoint) and args.moe_router_score_function == "softmax":
        raise UserError(
            f"{checkpoint} has hash layers of Megatron-Core, whose softmax is over all experts, but a routing mask has "
            "it over visible experts; only --moe-router-score-function sigmoid and sqrtsoftplus give the same weights"
        )
    return None


def check_mask(args: Namespace, mask: RoutingMask) -> None:
    """Raise `UserError` if the routing mask does not fit the model, the layout or the tokenizer that Megatron built."""
    vocab_size = get_tokenizer().vocab_size
    has_sizes_of_checkpoint = args.routing_mask is None or args.change_routing_mask
    if has_sizes_of_checkpoint and vocab_size < mask.vocab_size <= args.padded_vocab_size:
        # The mask comes from a checkpoint of an imported model, or replaces the mask of one. The model's embedding may
        # have more rows than its tokenizer has ids.
        vocab_size = mask.vocab_size
    mask.check_fits(
        vocab_size=vocab_size,
        num_experts=args.num_experts,
        layers=FeedForwardLayers.of_args(args),
        # A rank-local mask works with any layout; its expert-parallel size matters only for the speed of training.
        expert_model_parallel_size=None if args.skip_train else args.expert_model_parallel_size,
    )
    if mask.provenance.tokenizer is not None:
        check_same_tokenizer(args, mask.provenance.tokenizer, "the routing mask's token counts were")


# ---- Datasets --------------------------------------------------------------------------------------------------------


def data_errors(
    args: Namespace, mask: RoutingMask | None, vocab_size: int | None, most_bytes_read: float = math.inf
) -> Iterator[str]:
    """Yield an error for every unusable dataset that this rank checks.

    A dataset must be complete, made with the tokenizer of the run, and hold no token id beyond the vocabulary. Before
    training, the datasets must also have all the parts that training reads. The token ids are not read if their counts
    are in the mask, if `vocab_size` is unknown, or if the dataset is larger than `most_bytes_read`.

    Thousands of datasets can have terabytes. So the ranks of a node share the datasets, and the nodes, which may have
    files of their own, share the token ids of each dataset.
    """
    of_rank, of_node = _share("LOCAL_RANK", "LOCAL_WORLD_SIZE"), _share("GROUP_RANK", "GROUP_WORLD_SIZE")
    counted = [(dataset["bin_bytes"], dataset["idx_sha256"]) for dataset in (mask.provenance.datasets if mask else ())]
    try:
        prefixes = data_prefixes(args)
    except UserError as error:
        yield str(error)
        return
    if not (prefixes or args.mock_data):
        yield "no dataset: pass --data-path with a dataset that maskmoe preprocess makes, or --mock-data"
        return
    are_usable = True
    for prefix in prefixes[of_rank]:
        try:
            index = read_index(prefix)
            if (record := read_tokenizer_record(prefix)) is not None:
                check_same_tokenizer(args, record, f"dataset {prefix} was")
                if vocab_size is not None:
                    _check_end_of_documents(args, record, prefix)
            # The digest of an index takes long.
            is_counted = any(size == index.bin_bytes and sha256 == index.idx_sha256 for size, sha256 in counted)
            if vocab_size is not None and not is_counted and index.bin_bytes <= most_bytes_read:
                _check_token_ids(index, vocab_size, of_node)
        except UserError as error:
            are_usable = False
            yield str(error)
    if are_usable and not args.skip_train:
        yield from _errors_of_parts(args, of_rank)


def _share(number: str, count: str) -> slice:
    """Return the share of one of several ranks or nodes, which torchrun's variables number; without them, all."""
    return slice(int(os.environ.get(number, "0")), None, int(os.environ.get(count, "1")))


def blends_of(args: Namespace) -> list[tuple[list[str], list[float] | None]]:
    """Return the prefixes and weights of the one blend, or of each part; raise `UserError` if flags name none."""
    with megatrons_checks("--data-path, or the file of the paths, has no PREFIX… or WEIGHT PREFIX …"):
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [part for part in (blend, *(blend_per_split or [])) if part is not None]


def data_prefixes(args: Namespace) -> list[str]:
    """Return the prefixes of all datasets, each once; raise `UserError` if flags or their files name no datasets."""
    return list(dict.fromkeys(prefix for prefixes, _ in blends_of(args) for prefix in prefixes))


def _errors_of_parts(args: Namespace, of_rank: slice) -> Iterator[str]:
    """Yield an error for each part that training asks for and that the datasets, or those of a rank, lack.

    Without training data, Megatron would end at once, as if training were complete; without validation data, it would
    fail at the first evaluation. It would draw samples for ever from a part that has a share but no tokens.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is not None:
        # A part begins and ends at these shares of each dataset. None is a part without a share.
        parts = dataset_config.convert_split_vector_to_split_matrix(
            dataset_config.parse_and_normalize_split(args.split)
        )
    else:
        parts = blend_per_split or [True, True, True]  # mock data
    training, validation, _ = parts
    if training is None:
        yield "there are no training data; give them a share in --split or their own path"
    if validation is None and args.eval_iters > 0:
        yield "there are no validation data; give them a share in --split or their own path, or pass --eval-iters 0"
    for prefix in blend[0][of_rank] if blend is not None else ():
        yield from _empty_parts(args.split, parts, prefix)


def _empty_parts(split: str, parts: Sequence[Any], prefix: str) -> Iterator[str]:
    """Yield an error for each part in which a dataset has a share, the begin and end of a part, but no tokens."""
    lengths = read_index(prefix).sequence_lengths
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        first, last = (round(bound * len(lengths)) for bound in part or (0, 1))
        if part is not None and not lengths[first:last].any():
            yield (
                f"dataset {prefix}: --split {split} leaves the {name} part no tokens, because the split assigns whole "
                f"documents and the dataset has {len(lengths)}; give the part a share of 0, or a larger share"
            )


def check_same_tokenizer(args: Namespace, made_with: TokenizerRecord, what: str) -> None:
    """Raise `UserError`, beginning with `what`, if a file was made with another tokenizer than that of the run."""
    if args.tokenizer_sha256 not in (None, made_with.sha256):
        raise UserError(
            f"{what} made with another tokenizer ({made_with.model}, {made_with.vocab_size} ids, "
            f"sha256 {made_with.sha256[:12]}…) than --tokenizer-model {args.tokenizer_model}"
        )


def _check_end_of_documents(args: Namespace, made_with: TokenizerRecord, prefix: str) -> None:
    """Raise `UserError` if flags look for documents that end with another id than those of a dataset."""
    looks_for_end = args.eod_mask_loss or args.reset_attention_mask or args.reset_position_ids or args.fim_data
    if looks_for_end and made_with.eod_id not in (None, get_tokenizer().eod):
        raise UserError(
            f"id {made_with.eod_id} ended texts when dataset {prefix} was made, but --tokenizer-model "
            f"{args.tokenizer_model} now names id {get_tokenizer().eod}, which --eod-mask-loss, --reset-attention-mask"
            ", --reset-position-ids and --fim-data would look for: name the former token as eos_token in "
            "tokenizer_config.json"
        )


def _check_token_ids(index: DatasetIndex, vocab_size: int, chunks: slice) -> None:
    """Raise `UserError` if a token id in some chunks of a dataset is beyond the vocabulary, or if it has no tokens."""
    prefix, tokens = index.prefix, index.map_tokens()
    if not len(tokens):
        raise UserError(f"{bin_path(prefix)} holds no tokens")
    # As an unsigned number, a negative id is larger than any vocabulary.
    unsigned = tokens.view(f"u{tokens.dtype.itemsize}")
    starts = range(0, len(tokens), _CHUNK_TOKENS)
    for start in progress_bar(starts[chunks], f"checking {Path(prefix).name}", "chunk"):
        is_beyond = unsigned[start : start + _CHUNK_TOKENS] >= vocab_size
        if is_beyond.any():
            position = start + int(is_beyond.argmax())
            raise UserError(
                f"dataset {prefix} holds token id {tokens[position]} at position {position}, but the tokenizer has "
                f"{vocab_size} ids; it was made with another tokenizer"
            )
