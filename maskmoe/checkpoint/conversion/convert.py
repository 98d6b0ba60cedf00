"""The conversions as users ask for them: from one folder into another."""

import hashlib
import shutil
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskmoe.checkpoint.conversion.config_mapping import args_from_config, config_from_args, further_flags
from maskmoe.checkpoint.conversion.families import CONFIG_FILE, OpenedModel
from maskmoe.checkpoint.conversion.huggingface_models import open_model, write_huggingface
from maskmoe.checkpoint.conversion.megatron_models import find_megatron_checkpoint, open_megatron, write_megatron
from maskmoe.checkpoint.conversion.sources import CastSource, FiniteSource
from maskmoe.checkpoint.conversion.tokenizer import WITHOUT_TEXT
from maskmoe.checkpoint.conversion.upcycle import UpcycleSettings, upcycle
from maskmoe.checkpoint.conversion.writing import OutputFolder
from maskmoe.checkpoint.integrity import Damage, Manifest, check_content, check_structure
from maskmoe.data.tokenizer import TOKENIZER_TYPES, HuggingFaceTokenizer, load_tokenizer
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.routing_mask.parallel import available_cores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# In fp32 whatever the type of the model: it is added to scores that may be close to each other.
_EXPERT_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Settings:
    """What all conversions have in common.

    Attributes:
        load: what to convert: a model of transformers, a `torch_dist` checkpoint, or the folder of a run, of which the
            newest sound checkpoint is taken.
        save: folder for the result.
        dtype: of floating point tensors, a key of `DTYPES`; None: as they are stored.
        max_shard_size: bytes of a file, about.
        allow_nan: convert weights that are not finite.
        verify: compare files with the digests that were saved with them.
        tokenizer_type, tokenizer_model: Megatron's flags; None: what the model was trained with.
    """

    load: Path
    save: Path
    dtype: str | None = None
    max_shard_size: int = 5 * 10**9
    allow_nan: bool = False
    verify: bool = True
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None


def megatron_to_huggingface(settings: Settings, mask: RoutingMask | None = None) -> None:
    """Convert a checkpoint of any layout of ranks into a model of transformers.

    Args:
        settings: what, where to, and how.
        mask: the routing mask of a checkpoint that holds none.

    Raises:
        UserError: bad input, or the disk is full.
    """
    checkpoint = _find_sound_checkpoint(settings)
    _save_huggingface(open_megatron(checkpoint, mask), settings, _job(checkpoint, mask))


def huggingface_to_megatron(settings: Settings, mask: RoutingMask | None = None) -> list[str]:
    """Convert a model of transformers into a checkpoint that training starts from, in any layout of ranks.

    Args:
        settings: what, where to, and how.
        mask: the routing mask of a model that holds none; by default every id sees every expert.

    Returns:
        the flags that loading it needs besides `--use-checkpoint-args`.

    Raises:
        UserError: bad input, or the disk is full.
    """
    _verify_content(settings.load, settings)
    return _save_megatron(open_model(settings.load, mask), settings, _job(settings.load, mask))


def upcycle_model(settings: Settings, recipe: UpcycleSettings, mask: RoutingMask, to_megatron: bool) -> list[str]:
    """Make a MaskMoE model of a dense one of either format.

    Args:
        settings: what, where to, and how.
        recipe: how experts are made.
        mask: the routing mask.
        to_megatron: write a checkpoint, else a model of transformers.

    Returns:
        as `huggingface_to_megatron`; none for a model of transformers.

    Raises:
        UserError: bad input, or the disk is full.
    """
    if (settings.load / CONFIG_FILE).exists():
        folder = settings.load
        _verify_content(folder, settings)
        dense = open_model(folder)
    else:
        folder = _find_sound_checkpoint(settings)
        dense = open_megatron(folder)
    sparse = upcycle(dense, recipe, mask)
    args = args_from_config(sparse.config)
    for name in ("tokenizer_type", "tokenizer_model", "vocab_size"):
        setattr(args, name, getattr(dense.args, name, None))
    save = _save_megatron if to_megatron else _save_huggingface
    return save(replace(sparse, args=args), settings, _job(folder, mask) | {"recipe": asdict(recipe)})


def _save_huggingface(model: OpenedModel, settings: Settings, job: dict[str, Any]) -> list[str]:
    tokenizer = _tokenizer(model, settings)
    with _output(settings, job) as output:
        write_huggingface(_as_asked(model, settings), output, settings.max_shard_size, *tokenizer)
    return []


def _save_megatron(model: OpenedModel, settings: Settings, job: dict[str, Any]) -> list[str]:
    args = _megatron_args(model)
    args.tokenizer_type, args.tokenizer_model = _tokenizer(model, settings)
    if args.tokenizer_type == WITHOUT_TEXT:
        args.vocab_size = model.config["vocab_size"]
    model = replace(_as_asked(model, settings), args=args)
    dtype = model.source.tensors["model.embed_tokens.weight"].dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    with _output(settings, job) as output:
        if args.tokenizer_model == str(settings.load):
            args.tokenizer_model = _copy_tokenizer(settings.load, output.path / "tokenizer")
        is_ours = args.tokenizer_type in TOKENIZER_TYPES
        tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model) if is_ours else None
        args.tokenizer_sha256 = tokenizer and tokenizer.record().sha256
        write_megatron(model, output, settings.max_shard_size)
    return further_flags(args)


def _as_asked(model: OpenedModel, settings: Settings) -> OpenedModel:
    """A model with weights of the type that is asked for, and checked."""
    source = model.source
    if settings.dtype is not None:
        kept = frozenset(name for name in source.tensors if name.endswith(_EXPERT_BIAS))
        source = CastSource(source, DTYPES[settings.dtype], kept)
    return replace(model, source=source if settings.allow_nan else FiniteSource(source))


def _megatron_args(model: OpenedModel) -> Namespace:
    """The arguments that a model came with, unless its configuration was changed since."""
    if model.args is not None:
        described = config_from_args(model.args, model.config["vocab_size"])
        if all(model.config.get(name) == value for name, value in described.items()):
            return Namespace(**vars(model.args))
    return args_from_config(model.config)


def _tokenizer(model: OpenedModel, settings: Settings) -> tuple[str, str | None]:
    """The tokenizer, by type and path, that is asked for, else in Megatron's arguments, else beside the model.

    Raises:
        UserError: it is not on this machine.
    """
    kind = settings.tokenizer_type or getattr(model.args, "tokenizer_type", None)
    path = settings.tokenizer_model or getattr(model.args, "tokenizer_model", None)
    if kind == WITHOUT_TEXT:
        return kind, None
    if kind is not None and path is not None and Path(path).exists():
        return kind, path
    if (settings.load / _TOKENIZER_FILES[0]).is_file() and settings.tokenizer_model is None:
        return HuggingFaceTokenizer.__name__, str(settings.load)
    if kind is None:
        return WITHOUT_TEXT, None
    raise UserError(
        f"the tokenizer {path} does not exist; pass --tokenizer-model, or --tokenizer-type {WITHOUT_TEXT} to go without"
    )


def _copy_tokenizer(load: Path, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (load / name).is_file():
            shutil.copy(load / name, folder)
    return str(folder.resolve())


def _find_sound_checkpoint(settings: Settings) -> Path:
    checkpoint = find_megatron_checkpoint(settings.load)
    try:
        check_structure(checkpoint)
    except Damage as damage:
        raise UserError(f"{checkpoint} {damage}") from damage
    _verify_content(checkpoint, settings)
    return checkpoint


def _verify_content(folder: Path, settings: Settings) -> None:
    """Compare files with the digests beside them, if there are any."""
    try:
        manifest = Manifest.load(folder) if settings.verify else None
        parts = [slice(number, number + 1) for number in range(len(manifest.files) if manifest else 0)]
        with ThreadPoolExecutor(available_cores()) as executor:
            checks = executor.map(partial(check_content, folder), parts)
            list(tqdm(checks, total=len(parts), desc="verifying", unit="file", delay=0.5))
    except Damage as damage:
        raise UserError(f"{folder}: {damage}") from damage


def _output(settings: Settings, job: dict[str, Any]) -> OutputFolder:
    asked = asdict(settings) | {"load": str(settings.load.resolve())}
    return OutputFolder(settings.save, job | {name: asked[name] for name in asked if name not in ("save", "verify")})


def _job(source: Path, mask: RoutingMask | None) -> dict[str, Any]:
    """What is converted: its files by names, sizes and times of change, and the mask that it gets."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.relative_to(source)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {"source": digest.hexdigest(), "routing_mask": mask and mask.digest}
