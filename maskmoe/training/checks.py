"""Checks of a run's settings and files that are made before any compute is spent."""

import hashlib
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from tqdm import tqdm

from maskmoe.data.indexed_dataset import IndexedDatasetInfo, open_tokens, read_index, read_info, read_tokenizer_record
from maskmoe.data.tokenizer import TOKENIZER_TYPES
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import parse_data_path
from maskmoe.routing_mask.mask import RoutingMask

_CHUNK_TOKENS = 1 << 24
_PARTS = ("training", "validation", "test")


def check_supported(args: Namespace) -> None:
    """Refuse settings that do not work, or have no meaning yet, with masked routing.

    Raises:
        UserError: naming the first such setting and the reason.
    """
    for refusal in unsupported_settings(args):
        raise UserError(refusal)


def unsupported_settings(args: Namespace) -> Iterator[str]:
    """All settings that do not work, or have no meaning yet, with masked routing: each named with the reason."""
    balancing = args.moe_router_load_balancing_type
    balancing = {balancing} if isinstance(balancing, str) else set(balancing)
    pads_to_capacity = args.moe_expert_capacity_factor is not None and args.moe_pad_expert_input_to_capacity
    needs_transformer_engine = {
        "--multi-latent-attention": args.multi_latent_attention,
        "--context-parallel-size above 1": args.context_parallel_size > 1,
        "--moe-latent-size": args.moe_latent_size,
        "--recompute-modules layernorm, moe_act or mla_up_proj": (
            {"layernorm", "moe_act", "mla_up_proj"} & set(args.recompute_modules or ())
        ),
    }
    refusals = {
        "--routing-mask needs --num-experts: a model without experts has nothing to route": (
            args.routing_mask is not None and not args.num_experts
        ),
        "--moe-token-dispatcher-type must be alltoall or allgather: what flex calls, DeepEP and others, has not been "
        "tried with tokens that have fewer than k experts": args.moe_token_dispatcher_type == "flex",
        "--moe-router-load-balancing-type sinkhorn assigns equal shares of the tokens to all experts, which a routing "
        "mask rules out": "sinkhorn" in balancing,
        "--moe-router-load-balancing-type quantile_balancing sets its bias by the logits of all experts, also of "
        "invisible ones": "quantile_balancing" in balancing,
        "--moe-router-fusion is not supported: Transformer Engine's kernel knows no routing mask": (
            args.moe_router_fusion
        ),
        "--moe-pad-expert-input-to-capacity with --moe-router-enable-expert-bias never moves the bias: it counts the "
        "padding, whereby all experts have the same load": pads_to_capacity and args.moe_router_enable_expert_bias,
        "--moe-router-padding-for-quantization is not supported: it is for fp8 and fp4, which have not been tried": (
            args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8
        ),
        "--moe-enable-routing-replay is not supported: it replays choices whatever the routing mask shows": (
            args.moe_enable_routing_replay
        ),
        "--overlap-moe-expert-parallel-comm is not supported: its schedule drops the token ids": (
            args.overlap_moe_expert_parallel_comm
        ),
        "--mlp-chunks-for-training above 1 is not supported: it drops the token ids": (
            (args.mlp_chunks_for_training or 1) > 1
        ),
        "--cuda-graph-impl is not supported: the number of rows that a rank sends varies": args.cuda_graph_impl
        != "none",
        "--recompute-modules moe is not supported with fp8 or fp4, which have not been tried": (
            (args.fp8 or args.fp4) and "moe" in (args.recompute_modules or ())
        ),
        "--moe-use-upcycling is not supported: a dense checkpoint holds no routing mask": args.moe_use_upcycling,
        "--sft and --dataloader-inter-document-masking are not supported: they pack sequences, which later pipeline "
        "stages do not know of": args.sft or args.dataloader_inter_document_masking,
        "--hybrid-context-parallel is not supported: it divides sequences otherwise than the token ids": (
            args.hybrid_context_parallel
        ),
        "--qk-layernorm-all-heads says of what the norms are: it needs --qk-layernorm and --normalization RMSNorm": (
            args.qk_layernorm_all_heads and not (args.qk_layernorm and args.normalization == "RMSNorm")
        ),
        "--spec is not supported: the layers' spec is MaskMoE's own": args.spec is not None,
        "--experimental-attention-variant, --hybrid-layer-pattern and --heterogeneous-layers-config-path are not "
        "supported: their layers' specs have no MaskMoE layers": (
            args.experimental_attention_variant or args.hybrid_layer_pattern or args.heterogeneous_layers_config_path
        ),
        "--use-megatron-fsdp and --use-torch-fsdp2 are not supported: they have not been tried with a routing mask": (
            args.use_megatron_fsdp or args.use_torch_fsdp2
        ),
        "--transformer-impl must be local or transformer_engine": args.transformer_impl == "inference_optimized",
        **{
            f"{flag} needs Transformer Engine: pass --transformer-impl transformer_engine where it is installed": (
                given and args.transformer_impl == "local"
            )
            for flag, given in needs_transformer_engine.items()
        },
        "--tensor-model-parallel-size above 1 needs --sequence-parallel in training": (
            args.tensor_model_parallel_size > 1 and not args.sequence_parallel and not args.skip_train
        ),
        "--ckpt-format must be torch_dist: other formats do not carry the routing mask": args.ckpt_format
        != "torch_dist",
    }
    yield from (message for message, refused in refusals.items() if refused)
    if args.num_experts:
        yield from _unsupported_numbers(args)


def _unsupported_numbers(args: Namespace) -> Iterator[str]:
    """Numbers that do not fit the number of experts."""
    num_experts, topk = args.num_experts, args.moe_router_topk
    if topk > num_experts:
        yield f"--moe-router-topk {topk} is more than --num-experts {num_experts}"
    if num_experts % args.expert_model_parallel_size:
        yield (
            f"--num-experts {num_experts} is not divisible by "
            f"--expert-model-parallel-size {args.expert_model_parallel_size}"
        )
    capacity = args.moe_expert_capacity_factor
    if capacity is not None and args.moe_pad_expert_input_to_capacity and capacity * topk > num_experts:
        yield (
            f"--moe-expert-capacity-factor {capacity} gives an expert room for more tokens than there are, which "
            f"--moe-pad-expert-input-to-capacity cannot fill; use at most {num_experts / topk:g}"
        )
    num_groups, group_topk = args.moe_router_num_groups, args.moe_router_group_topk
    if num_groups and group_topk and not group_topk <= topk <= group_topk * (num_experts // num_groups):
        yield (
            f"--moe-router-group-topk {group_topk} groups of {num_experts // num_groups} experts do not hold "
            f"--moe-router-topk {topk} of them, at least one each"
        )


def check_tokenizer(args: Namespace) -> None:
    """Check that the tokenizer is described in full, which Megatron finds out only in a traceback.

    Raises:
        UserError: its type or vocabulary size is missing, or its model does not exist on this machine.
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
    """Check that checkpoints can be written, which would otherwise come out when the first of them is due.

    Raises:
        UserError: the folder in `--save` can neither be written nor made.
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
    """Check that the mask fits the model, the layout and the tokenizer.

    Raises:
        UserError: naming both sides.
    """
    vocab_size = get_tokenizer().vocab_size
    if args.routing_mask is None and vocab_size < mask.vocab_size <= args.padded_vocab_size:
        # The checkpoint's, of an imported model whose embedding has more rows than its tokenizer has ids.
        vocab_size = mask.vocab_size
    mask.check_fits(
        vocab_size=vocab_size,
        num_experts=args.num_experts,
        num_layers=args.num_layers + (args.mtp_num_layers or 0),
        # Where the experts of a rank-local mask are matters for the speed of training only.
        expert_model_parallel_size=None if args.skip_train else args.expert_model_parallel_size,
    )
    if mask.provenance.tokenizer is not None:
        _check_same_tokenizer(args, mask.provenance.tokenizer, "the routing mask's token counts were")


def check_data(args: Namespace, mask: RoutingMask | None) -> None:
    """Check every dataset of the run: whole, made with the run's tokenizer, and no id beyond its vocabulary.

    Before training also that the data have all the parts it will read.
    Datasets that were counted for the mask had their ids checked then. Others are read once, by one rank of each node.

    Args:
        args: validated by Megatron.
        mask: the routing mask; None for a model without experts.

    Raises:
        UserError: naming the file.
    """
    is_first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
    for error in data_errors(args, mask, get_tokenizer().vocab_size, math.inf if is_first_of_node else 0):
        raise UserError(error)


def data_errors(
    args: Namespace, mask: RoutingMask | None, vocab_size: int | None, most_bytes_read: float
) -> Iterator[str]:
    """All that is wrong with the datasets of the run, see `check_data`.

    Args:
        mask: the routing mask, if there is one that can be read.
        vocab_size: ids of the tokenizer; None if it is unknown, and no ids are read.
        most_bytes_read: ids are read of datasets up to this size.
    """
    try:
        _check_data_paths(args)
    except UserError as error:
        yield str(error)
        return
    are_readable = True
    for prefix in dict.fromkeys(data_prefixes(args)):
        try:
            info = read_info(prefix)
            _check_dataset_tokenizer(args, prefix)
            if vocab_size is not None and not was_counted(info, mask) and info.bin_bytes <= most_bytes_read:
                _check_token_ids(prefix, vocab_size)
        except UserError as error:
            yield str(error)
            are_readable = False
    if are_readable and not args.skip_train:
        try:
            _check_parts(args)
        except UserError as error:
            yield str(error)


def was_counted(dataset: IndexedDatasetInfo, mask: RoutingMask | None) -> bool:
    """Whether the routing mask's token counts are of this dataset, so that all its ids are known to be sound."""
    counted = mask.provenance.datasets if mask else ()
    return any(
        (entry["idx_sha256"], entry["bin_bytes"]) == (dataset.idx_sha256, dataset.bin_bytes) for entry in counted
    )


def data_prefixes(args: Namespace) -> Iterator[str]:
    """The prefixes of all datasets of the run, some perhaps more than once."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for part in [blend, *(blend_per_split or [])]:
        if part is not None:
            yield from part[0]


def _check_dataset_tokenizer(args: Namespace, prefix: str) -> None:
    record = read_tokenizer_record(prefix)
    if record is not None:
        _check_same_tokenizer(args, record.to_json(), f"dataset {prefix} was")


def _check_data_paths(args: Namespace) -> None:
    paths = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    for path in paths:
        if path is not None:
            parse_data_path(path)
    files = [args.data_args_path, args.per_split_data_args_path]
    if all(source is None for source in paths + files) and not args.mock_data:
        raise UserError("no dataset: pass --data-path PREFIX, made by tools/preprocess_data.py")


def _check_parts(args: Namespace) -> None:
    """Check that the data have the parts that training asks for.

    Without training data Megatron ends at once as if all were done, without validation data it fails at the first
    evaluation, and from a part that has a share but no token it draws samples for ever.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is not None:
        parts = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
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
            _check_split(prefix, args.split, parts)


def _check_split(prefix: str, split: str, parts: list[tuple[float, float] | None]) -> None:
    lengths = read_index(prefix).sequence_lengths
    for name, part in zip(_PARTS, parts, strict=True):
        if part is None:
            continue
        first, last = (round(bound * len(lengths)) for bound in part)
        if not lengths[first:last].any():
            raise UserError(
                f"dataset {prefix}: --split {split} leaves the {name} part no tokens, since whole documents are "
                f"dealt out and there are {len(lengths)}; give the part a share of 0, or more"
            )


def tokenizer_sha256(args: Namespace) -> str | None:
    """The digest of the file behind `--tokenizer-model`; None for tokenizers that are not made by our tools."""
    if args.tokenizer_type not in TOKENIZER_TYPES or args.tokenizer_model is None:
        return None
    path = Path(args.tokenizer_model)
    path = path / "tokenizer.json" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_same_tokenizer(args: Namespace, made_with: dict[str, Any], what: str) -> None:
    if args.tokenizer_sha256 not in (None, made_with["sha256"]):
        raise UserError(
            f"{what} made with another tokenizer ({made_with['model']}, {made_with['vocab_size']} ids, "
            f"sha256 {made_with['sha256'][:12]}…) than --tokenizer-model {args.tokenizer_model}"
        )


def _check_token_ids(prefix: str, vocab_size: int) -> None:
    tokens = open_tokens(prefix)
    # Seen as unsigned, a negative id is a large one.
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
