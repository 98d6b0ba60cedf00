"""Runs the conversions that users ask for: each reads a model from one folder and writes it to another."""

import shutil
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from maskmoe.checkpoint.integrity import check_structure
from maskmoe.checkpoint.series import locate_checkpoint
from maskmoe.conversion.blocks import CastSource, FiniteSource, JoinedSource, TensorSource
from maskmoe.conversion.config_mapping import args_from_config, config_from_args, further_flags
from maskmoe.conversion.huggingface_models import check_files, open_model, write_huggingface
from maskmoe.conversion.hybrid_models import is_hybrid, with_pattern
from maskmoe.conversion.megatron_models import open_megatron, write_megatron
from maskmoe.conversion.opened_model import CONFIG_FILE, OpenedModel
from maskmoe.conversion.settings import DERIVED_PATTERN, DTYPE_NAMES, Settings, UpcycleSettings
from maskmoe.conversion.tokenizer import TOKENIZER_FILES, WITHOUT_TEXT, choose_tokenizer, tokenizer_sha256
from maskmoe.conversion.upcycle import upcycle
from maskmoe.conversion.writing import OutputFolder
from maskmoe.errors import UserError
from maskmoe.files.outputs import lies_inside
from maskmoe.routing_mask.mask import RoutingMask

_DTYPES = dict(zip(DTYPE_NAMES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
_VOCABULARY_ARGS = (
    "tokenizer_type",
    "tokenizer_model",
    "tokenizer_sha256",
    "vocab_size",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
)
# Expert biases stay in fp32 whatever the model's dtype: they are added to scores that may be close to each other.
_EXPERT_BIAS = "e_score_correction_bias"


def megatron_to_huggingface(settings: Settings, mask: RoutingMask | None = None) -> None:
    """Convert a checkpoint of any layout of ranks into a transformers model.

    Args:
        settings: the settings of the conversion.
        mask: the routing mask for a checkpoint that holds none.

    Raises:
        UserError: the input is bad, or the disk is full.
    """
    checkpoint, model = _open_checkpoint(settings, mask)
    _save_huggingface(model, settings, _output_folder(settings, checkpoint, mask))


def huggingface_to_megatron(settings: Settings, mask: RoutingMask | None = None) -> list[str]:
    """Convert a transformers model into a checkpoint that training starts from, in any layout of ranks.

    Args:
        settings: the settings of the conversion.
        mask: the routing mask for a model that holds none; by default every id sees every expert.

    Returns:
        the flags that loading the checkpoint needs in addition to `--use-checkpoint-args`.

    Raises:
        UserError: the input is bad, or the disk is full.
    """
    model = open_model(settings.load, mask)
    return _save_megatron(model, settings, _output_folder(settings, settings.load, mask))


def upcycle_model(settings: Settings, recipe: UpcycleSettings, mask: RoutingMask, to_megatron: bool) -> list[str]:
    """Make a MaskMoE model of a dense model of either format.

    Args:
        settings: the settings of the conversion.
        recipe: how experts are made.
        mask: the routing mask.
        to_megatron: write a checkpoint rather than a transformers model.

    Returns:
        as `huggingface_to_megatron`; no flags for a transformers model.

    Raises:
        UserError: the input is bad, or the disk is full.
    """
    if (settings.load / CONFIG_FILE).exists():
        folder, dense = settings.load, open_model(settings.load)
    else:
        folder, dense = _open_checkpoint(settings)
    sparse = upcycle(dense, recipe, mask)
    args, dense_args = args_from_config(sparse.config), dense.args or Namespace()
    args.__dict__ |= {name: value for name, value in vars(dense_args).items() if name in _VOCABULARY_ARGS}
    pattern = settings.hybrid_layer_pattern or (DERIVED_PATTERN if is_hybrid(dense_args) else None)
    args = with_pattern(args, sparse.config, pattern)
    # The dense model's source provides the padding of the vocabulary.
    sparse = replace(sparse, source=JoinedSource(sparse.source, dense.source), args=args)
    save = _save_megatron if to_megatron else _save_huggingface
    return save(sparse, settings, _output_folder(settings, folder, mask, recipe))


def _open_checkpoint(settings: Settings, mask: RoutingMask | None = None) -> tuple[Path, OpenedModel]:
    """Return the folder of the checkpoint to convert, and its model; the user may pass another tokenizer."""
    checkpoint = locate_checkpoint(settings.load)
    check_structure(checkpoint)
    tokenizer = {"tokenizer_type": settings.tokenizer_type, "tokenizer_model": settings.tokenizer_model}
    passed = {name: value for name, value in tokenizer.items() if value is not None}
    return checkpoint, open_megatron(checkpoint, mask, passed)


def _output_folder(
    settings: Settings, source: Path, mask: RoutingMask | None, recipe: UpcycleSettings | None = None
) -> OutputFolder:
    """Return the folder for the result, which resumes an interrupted conversion only if nothing has changed.

    Args:
        settings: the settings of the conversion.
        source: the folder that is converted.
        mask: the routing mask that the user passed.
        recipe: how experts are made, if the model is upcycled.

    Raises:
        UserError: the folder lies inside the source.
    """
    # The source may be one of several checkpoints in the folder `--load`.
    if lies_inside(settings.save, settings.load) or lies_inside(settings.save, source):
        raise UserError(f"{settings.save} lies inside the folder that is converted; name a folder elsewhere")
    files = {str(path.relative_to(source)): path.stat() for path in source.rglob("*") if path.is_file()}
    job = asdict(settings) | {
        "load": str(source.resolve()),
        "recipe": recipe and asdict(recipe),
        "source": {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()},
        "routing_mask": mask and mask.digest,
    }
    del job["save"], job["verify"]

    verify = partial(check_files, source) if settings.verify else lambda: None
    return OutputFolder(settings.save, job, verify)


def _save_huggingface(model: OpenedModel, settings: Settings, output_folder: OutputFolder) -> list[str]:
    """Write a model in transformers' format; return no flags."""
    tokenizer = choose_tokenizer(model.args, settings)
    with output_folder as output:
        write_huggingface(_cast_and_check(model, settings), output, settings.max_shard_size, *tokenizer)
    return []


def _save_megatron(model: OpenedModel, settings: Settings, output_folder: OutputFolder) -> list[str]:
    """Write a model as a checkpoint; return the flags that loading needs."""
    # Complete Megatron's arguments.
    args = _megatron_args(model, settings.hybrid_layer_pattern)
    args.tokenizer_type, args.tokenizer_model = choose_tokenizer(model.args, settings, may_replace=True)
    if args.tokenizer_type == WITHOUT_TEXT:
        args.vocab_size = model.config["vocab_size"]
    model = _cast_and_check(model, settings)
    dtype = model.source.tensors["model.embed_tokens.weight"].dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    # Write the checkpoint, with its own copy of a tokenizer that lies beside the model.
    with output_folder as output:
        if args.tokenizer_model == str(settings.load):
            args.tokenizer_model = _copy_tokenizer(settings.load, output.path / "tokenizer")
        args.tokenizer_sha256 = tokenizer_sha256(args.tokenizer_type, args.tokenizer_model)
        write_megatron(model, args, output, settings.max_shard_size)
    return further_flags(args)


def _cast_and_check(model: OpenedModel, settings: Settings) -> OpenedModel:
    """Return a model whose weights are cast to `settings.dtype` and refused if they are not finite."""
    source: TensorSource = model.source
    if settings.dtype is not None:
        kept = frozenset(name for name in source.tensors if name.endswith(_EXPERT_BIAS))
        source = CastSource(source, _DTYPES[settings.dtype], kept)
    return replace(model, source=source if settings.allow_nan else FiniteSource(source))


def _megatron_args(model: OpenedModel, pattern: str | None) -> Namespace:
    """Return the arguments that a model came with; arguments made from its configuration if that has changed since.

    Args:
        model: the model.
        pattern: see `Settings.hybrid_layer_pattern`.

    Raises:
        UserError: the model cannot be expressed in Megatron, or the pattern does not fit it.
    """
    if model.args is not None:
        described = config_from_args(model.args, model.config["vocab_size"])
        if all(model.config.get(name) == value for name, value in described.items()):
            return with_pattern(Namespace(**vars(model.args)), model.config, pattern)
        if pattern is None and is_hybrid(model.args):
            pattern = DERIVED_PATTERN
    return with_pattern(args_from_config(model.config), model.config, pattern)


def _copy_tokenizer(load: Path, folder: Path) -> str:
    """Copy the files of a tokenizer; return the path of the copy."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (load / name).is_file():
            shutil.copy(load / name, folder)
    return str(folder.resolve())
