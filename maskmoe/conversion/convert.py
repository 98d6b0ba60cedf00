"""The conversions as users ask for them: from one folder into another."""

import hashlib
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from maskmoe.checkpoint.integrity import Damage, check_content, check_structure
from maskmoe.conversion.config_mapping import args_from_config, config_from_args, further_flags
from maskmoe.conversion.families import CONFIG_FILE, OpenedModel
from maskmoe.conversion.huggingface_models import open_model, write_huggingface
from maskmoe.conversion.megatron_models import find_megatron_checkpoint, open_megatron, write_megatron
from maskmoe.conversion.sources import CastSource, FiniteSource, JoinedSource
from maskmoe.conversion.tokenizer import WITHOUT_TEXT
from maskmoe.conversion.upcycle import UpcycleSettings, upcycle
from maskmoe.conversion.writing import OutputFolder
from maskmoe.data.tokenizer import TOKENIZER_TYPES, HuggingFaceTokenizer, load_tokenizer
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_OF_VOCABULARY = (
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
)
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
    checkpoint = _find_checkpoint(settings)
    model = open_megatron(checkpoint, mask, **_tokenizer_flags(settings))
    _save_huggingface(model, _Job(settings, checkpoint, mask))


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
    return _save_megatron(open_model(settings.load, mask), _Job(settings, settings.load, mask))


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
        dense = open_model(folder)
    else:
        folder = _find_checkpoint(settings)
        dense = open_megatron(folder, **_tokenizer_flags(settings))
    sparse = upcycle(dense, recipe, mask)
    args = args_from_config(sparse.config)
    known = vars(dense.args) if dense.args else {}
    args.__dict__ |= {name: known[name] for name in _OF_VOCABULARY if name in known}
    # The dense model still has the padding of the vocabulary.
    sparse = replace(sparse, source=JoinedSource(sparse.source, dense.source), args=args)
    save = _save_megatron if to_megatron else _save_huggingface
    return save(sparse, _Job(settings, folder, mask, recipe))


@dataclass(frozen=True)
class _Job:
    """A conversion with all that its result depends on.

    Attributes:
        settings: what, where to, and how.
        source: the folder that is converted.
        mask: the routing mask that the model gets.
        recipe: how it is upcycled.
    """

    settings: Settings
    source: Path
    mask: RoutingMask | None = None
    recipe: UpcycleSettings | None = None

    def output(self) -> OutputFolder:
        """The folder for the result.

        Raises:
            UserError: it is inside the source.
        """
        if self.settings.save.resolve().is_relative_to(self.source.resolve()):
            raise UserError(f"{self.settings.save} is inside of what is converted; name a folder elsewhere")
        asked = asdict(self.settings) | {
            "load": str(self.source.resolve()),
            "recipe": self.recipe and asdict(self.recipe),
        }
        job = {name: value for name, value in asked.items() if name not in ("save", "verify")}
        job |= {"source": self._fingerprint(), "routing_mask": self.mask and self.mask.digest}
        return OutputFolder(self.settings.save, job, self._verify)

    def _fingerprint(self) -> str:
        """A digest of the names, sizes and times of change of the source's files."""
        digest = hashlib.sha256()
        for path in sorted(self.source.rglob("*")):
            if path.is_file():
                status = path.stat()
                digest.update(f"{path.relative_to(self.source)} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _verify(self) -> None:
        """Compare the source's files with the digests beside them, if there are any."""
        if self.settings.verify:
            try:
                check_content(self.source)
            except Damage as damage:
                raise UserError(f"{self.source}: {damage}") from damage


def _save_huggingface(model: OpenedModel, job: _Job) -> list[str]:
    settings = job.settings
    tokenizer = _tokenizer(model, settings)
    with job.output() as output:
        write_huggingface(_as_asked(model, settings), output, settings.max_shard_size, *tokenizer)
    return []


def _save_megatron(model: OpenedModel, job: _Job) -> list[str]:
    settings = job.settings
    args = _megatron_args(model)
    args.tokenizer_type, args.tokenizer_model = _tokenizer(model, settings)
    if args.tokenizer_type == WITHOUT_TEXT:
        args.vocab_size = model.config["vocab_size"]
    model = replace(_as_asked(model, settings), args=args)
    dtype = model.source.tensors["model.embed_tokens.weight"].dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    with job.output() as output:
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


def _tokenizer_flags(settings: Settings) -> dict[str, str]:
    flags = {"tokenizer_type": settings.tokenizer_type, "tokenizer_model": settings.tokenizer_model}
    return {name: value for name, value in flags.items() if value is not None}


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


def _find_checkpoint(settings: Settings) -> Path:
    checkpoint = find_megatron_checkpoint(settings.load)
    try:
        check_structure(checkpoint)
    except Damage as damage:
        raise UserError(f"{checkpoint} {damage}") from damage
    return checkpoint
