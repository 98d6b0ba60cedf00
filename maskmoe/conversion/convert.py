"""Runs the conversions that users ask for: each reads a model from one folder and writes it to another."""

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maskmoe.checkpoint.integrity import check_content, check_structure, has_digests, iteration_of
from maskmoe.checkpoint.series import locate_checkpoint
from maskmoe.conversion.config_mapping import args_from_config, further_flags, hybrid_args, is_hybrid, updated_args
from maskmoe.conversion.export_huggingface import write_huggingface
from maskmoe.conversion.import_huggingface import open_model
from maskmoe.conversion.megatron_models import open_megatron, write_megatron
from maskmoe.conversion.model_files import output_folder
from maskmoe.conversion.model_tensors import OpenedModel
from maskmoe.conversion.seal import check_seal
from maskmoe.conversion.settings import CONFIG_FILE, DTYPE_NAMES, Settings, UpcycleSettings
from maskmoe.conversion.tensor_sources import CastSource, JoinedSource
from maskmoe.conversion.tokenizer import TOKENIZER_FILES, WITHOUT_TEXT, choose_tokenizer
from maskmoe.conversion.upcycle import upcycle
from maskmoe.data.tokenizer_record import tokenizer_sha256
from maskmoe.errors import UserError
from maskmoe.files.output_checks import lies_inside
from maskmoe.files.outputs import unwinding_on_signals
from maskmoe.files.untrusted import resolve_inside
from maskmoe.routing_mask.mask import RoutingMask

_DTYPES = dict(zip(DTYPE_NAMES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
# Expert biases stay in fp32 whatever the model's dtype: they are added to scores that may be close to each other.
_EXPERT_BIAS = "e_score_correction_bias"


def megatron_to_huggingface(settings: Settings, mask: RoutingMask | None = None) -> None:
    """Convert a checkpoint of any layout of ranks into a transformers model.

    Args:
        settings: The settings of the conversion.
        mask: The routing mask for a checkpoint that holds none.

    Raises:
        UserError: The input is bad, or the disk is full.
    """
    checkpoint, model = _open_checkpoint(settings, mask)
    with _output(settings, checkpoint) as folder:
        _save_huggingface(model, settings, folder)


@contextmanager
def temporary_export(load: Path, mask: RoutingMask | None = None, **settings: Any) -> Iterator[Path]:
    """Yield a temporary folder with a checkpoint as a transformers model; remove it at the end, also after SIGTERM.

    Args:
        load: As `Settings.load`.
        mask: The routing mask for a checkpoint that holds none.
        settings: Further fields of `Settings`.

    Raises:
        UserError: The checkpoint cannot be converted, or the disk is full.
    """
    with unwinding_on_signals(), tempfile.TemporaryDirectory(prefix="maskmoe-export-") as private:
        folder = Path(private, "model")  # within a folder that only this user may read
        megatron_to_huggingface(Settings(load, folder, **settings), mask)
        yield folder


def huggingface_to_megatron(settings: Settings, mask: RoutingMask | None = None) -> list[str]:
    """Convert a transformers model into a checkpoint that training starts from, in any layout of ranks.

    Args:
        settings: The settings of the conversion.
        mask: The routing mask for a model that holds none; by default every id sees every expert.

    Returns:
        The flags that loading the checkpoint needs in addition to `--use-checkpoint-args`.

    Raises:
        UserError: The input is bad, or the disk is full.
    """
    model = open_model(settings.load, mask)
    with _output(settings, settings.load) as folder:
        return _save_megatron(model, settings, folder)


def upcycle_model(settings: Settings, recipe: UpcycleSettings, mask: RoutingMask, to_megatron: bool) -> list[str]:
    """Make a MaskMoE model of a dense model of either format.

    Args:
        settings: The settings of the conversion.
        recipe: How experts are made.
        mask: The routing mask.
        to_megatron: Write a checkpoint rather than a transformers model.

    Returns:
        As `huggingface_to_megatron`; no flags for a transformers model.

    Raises:
        UserError: The input is bad, or the disk is full.
    """
    if (settings.load / CONFIG_FILE).exists():
        source, dense = settings.load, open_model(settings.load)
    else:
        source, dense = _open_checkpoint(settings)
    sparse = upcycle(dense, recipe, mask)
    # The dense model's source provides the padding of the vocabulary.
    sparse = replace(sparse, source=JoinedSource(sparse.source, dense.source))
    with _output(settings, source) as folder:
        return (_save_megatron if to_megatron else _save_huggingface)(sparse, settings, folder)


def _open_checkpoint(settings: Settings, mask: RoutingMask | None = None) -> tuple[Path, OpenedModel]:
    """Return the folder of the checkpoint to convert, and its model; the user may pass another tokenizer."""
    checkpoint = locate_checkpoint(settings.load, settings.ckpt_step)
    iteration = iteration_of(checkpoint)
    name = checkpoint.name if iteration is None else f"iteration {iteration}"
    print(f"loading: {name} in {checkpoint.parent}", file=sys.stderr)
    check_structure(checkpoint)
    if not has_digests(checkpoint):
        print(f"warning: {checkpoint} has no digests of its files, so its content is not verified", file=sys.stderr)
    tokenizer = {"tokenizer_type": settings.tokenizer_type, "tokenizer_model": settings.tokenizer_model}
    passed = {name: value for name, value in tokenizer.items() if value is not None}
    return checkpoint, open_megatron(checkpoint, mask, passed)


@contextmanager
def _output(settings: Settings, source: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `settings.save`, after a check of the source's digests.

    Args:
        settings: The settings of the conversion.
        source: The folder that is converted, which may be one of several checkpoints in the folder `settings.load`.

    Raises:
        UserError: The result would lie inside the source, the folder has content, the source has changed since it was
            saved, or the disk is full.
    """
    if lies_inside(settings.save, settings.load) or lies_inside(settings.save, source):
        raise UserError(f"{settings.save} lies inside the folder that is converted; name a folder elsewhere")
    with output_folder(settings.save) as folder:
        if settings.verify:
            (check_seal if (source / CONFIG_FILE).exists() else check_content)(source)
        yield folder


def _save_huggingface(model: OpenedModel, settings: Settings, folder: Path) -> list[str]:
    """Write a model in transformers' format; return no flags."""
    tokenizer = _tokenizer_of(model, settings)
    write_huggingface(_cast(model, settings), folder, settings.max_shard_size, *tokenizer)
    return []


def _save_megatron(model: OpenedModel, settings: Settings, folder: Path) -> list[str]:
    """Write a model as a checkpoint; return the flags that loading needs."""
    # Complete Megatron's arguments. A checkpoint gets its own copy of a tokenizer that lies beside the model.
    args = Namespace(**vars(_megatron_args(model)))
    args.tokenizer_type, args.tokenizer_model = _tokenizer_of(model, settings, may_replace=True)
    args.tokenizer_sha256 = tokenizer_sha256(args.tokenizer_type, args.tokenizer_model)
    if args.tokenizer_model == str(settings.load):
        (folder / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if os.path.lexists(settings.load / name):
                shutil.copy(resolve_inside(settings.load, name), folder / "tokenizer")
        args.tokenizer_model = str(settings.save.resolve() / "tokenizer")
    if args.tokenizer_type == WITHOUT_TEXT:
        args.vocab_size = model.config["vocab_size"]
    model = _cast(model, settings)
    dtype = model.source.tensors["model.embed_tokens.weight"].dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    write_megatron(model, args, folder, settings.max_shard_size)
    return further_flags(args)


def _tokenizer_of(model: OpenedModel, settings: Settings, may_replace: bool = False) -> tuple[str, str | None]:
    """Choose the tokenizer of a model and report it, see `choose_tokenizer`."""
    kind, path = choose_tokenizer(model.args, settings, may_replace)
    print(f"loading: tokenizer {kind} {path or ''}".rstrip(), file=sys.stderr)
    return kind, path


def _cast(model: OpenedModel, settings: Settings) -> OpenedModel:
    """Return a model whose weights are cast to `settings.dtype`, and refused if they are not finite."""
    dtype = None if settings.dtype is None else _DTYPES[settings.dtype]
    kept = frozenset(name for name in model.source.tensors if name.endswith(_EXPERT_BIAS))
    return replace(model, source=CastSource(model.source, dtype, kept))


def _megatron_args(model: OpenedModel) -> Namespace:
    """Return the arguments that a model came with, updated by its configuration, or made from its configuration.

    A model that did not come from Megatron becomes a hybrid model; other models keep their class.

    Raises:
        UserError: The model cannot be expressed in Megatron.
    """
    args = args_from_config(model.config) if model.args is None else updated_args(model.args, model.config)
    becomes_hybrid = (model.args is None or is_hybrid(model.args)) and not is_hybrid(args)
    return hybrid_args(args, model.config) if becomes_hybrid else args
