"""The models of a series: where they are, whether they are alike, and how to come to them in transformers' format."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.json_files import read_json

_CONFIG_FILE = "config.json"
_MODEL_TYPE = "maskmoe"
# What exported models keep of Megatron's arguments.
_MEGATRON_ARGS = "megatron/args.json"


@dataclass(frozen=True)
class ModelSource:
    """A model to analyse.

    Attributes:
        path: a Megatron checkpoint, or a folder in transformers' format.
        name: for people.
        iteration: of training; None if it is not known.
        is_megatron: of Megatron's format.
    """

    path: Path
    name: str
    iteration: int | None = None
    is_megatron: bool = False


@dataclass(frozen=True)
class ModelShape:
    """What must be the same in all models of a series.

    Attributes:
        vocab_size: number of token ids.
        layers: numbers of those with experts, from 1.
        num_experts: N.
        topk: k.
    """

    vocab_size: int
    layers: tuple[int, ...]
    num_experts: int
    topk: int

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"{self.vocab_size:,} token ids and in layers {layers} top-{self.topk} of {self.num_experts} experts"


@dataclass(frozen=True)
class Conversion:
    """How Megatron's checkpoints are converted.

    Attributes:
        scratch_dir: where temporary folders are made; None: the system's.
        tokenizer_type, tokenizer_model: Megatron's flags; None: what the model was trained with.
    """

    scratch_dir: Path | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None


def find_models(paths: Sequence[Path], steps: Sequence[int] = ()) -> tuple[ModelSource, ...]:
    """The models at some paths, in order.

    Args:
        paths: each a folder of Megatron checkpoints, which stands for all of them in order of their iterations, one
            Megatron checkpoint, or a folder in transformers' format.
        steps: iterations to take, in this order, of folders of checkpoints; all if empty.

    Raises:
        UserError: a path is none of these, or a checkpoint is missing or not sound.
    """
    formats = [_format_of(path) for path in paths]
    if steps and _Format.RUN not in formats:
        raise UserError("--ckpt-step chooses among the checkpoints of a folder, but --load names none; leave it out")
    models = []
    for path, kind in zip(paths, formats, strict=True):
        if kind is _Format.TRANSFORMERS:
            models.append(ModelSource(path, str(path)))
            continue
        checkpoints = [path] if kind is _Format.CHECKPOINT else _checkpoints_of_run(path, steps)
        models += [_megatron_model(checkpoint, with_folder=len(paths) > 1) for checkpoint in checkpoints]
    return tuple(models)


class _Format(Enum):
    """What a folder is."""

    TRANSFORMERS = auto()
    CHECKPOINT = auto()
    RUN = auto()


def _format_of(path: Path) -> _Format:
    if not path.is_dir():
        raise UserError(f"--load {path} does not exist, or is no folder")
    if (path / _CONFIG_FILE).is_file():
        return _Format.TRANSFORMERS

    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.checkpoint.integrity import LAYOUT_FILE
    from maskmoe.checkpoint.series import has_checkpoint

    if (path / LAYOUT_FILE).is_file():
        return _Format.CHECKPOINT
    if has_checkpoint(path):
        return _Format.RUN
    raise UserError(f"--load {path} holds neither Megatron checkpoints nor a model in transformers' format")


def _megatron_model(checkpoint: Path, with_folder: bool) -> ModelSource:
    """A checkpoint, named by its iteration, and by its folder where there are several. Raises UserError."""
    from maskmoe.checkpoint.integrity import Damage, check_structure
    from maskmoe.checkpoint.series import iteration_of

    try:
        check_structure(checkpoint)
    except Damage as damage:
        raise UserError(f"{checkpoint} {damage}; choose sound checkpoints with --ckpt-step") from damage
    iteration = iteration_of(checkpoint)
    name = checkpoint.name if iteration is None else f"iteration {iteration}"
    return ModelSource(checkpoint, f"{checkpoint.parent} {name}" if with_folder else name, iteration, is_megatron=True)


def _checkpoints_of_run(folder: Path, steps: Sequence[int]) -> list[Path]:
    """Those asked for, else all that the run has finished, in order."""
    from maskmoe.checkpoint.series import RELEASE, checkpoint_path, read_tracker, saved_iterations

    if steps:
        return [checkpoint_path(folder, step) for step in steps]
    tracked = read_tracker(folder)
    if tracked == RELEASE:
        return [folder / RELEASE]
    finished = [step for step in reversed(saved_iterations(folder)) if tracked is None or step <= tracked]
    if not finished:
        raise UserError(f"--load {folder} holds no finished checkpoint")
    return [checkpoint_path(folder, step) for step in finished]


def common_shape(models: Sequence[ModelSource]) -> tuple[ModelShape, int]:
    """The shape of all models, and the longest sequence that all of them take.

    Raises:
        UserError: there is none, one cannot be read or has no experts, or they differ.
    """
    if not models:
        raise UserError("there is no model to analyse; name one with --load")
    configs = [_read_config(model) for model in models]
    first, *others = (_shape(config, model) for config, model in zip(configs, models, strict=True))
    for model, shape in zip(models[1:], others, strict=True):
        if shape != first:
            raise UserError(
                f"the models of a series must be alike, but {models[0].path} has {first}, and {model.path} has {shape}"
            )
    return first, min(config["max_position_embeddings"] for config in configs)


def _shape(config: Mapping[str, Any], model: ModelSource) -> ModelShape:
    layers = tuple(number for number, kind in enumerate(config["mlp_layer_types"], start=1) if kind == "sparse")
    if not layers:
        raise UserError(f"{model.path} has no routed experts; name a mixture-of-experts model")
    return ModelShape(config["vocab_size"], layers, config["num_experts"], config["num_experts_per_tok"])


def _read_config(model: ModelSource) -> Mapping[str, Any]:
    """The fields of `MaskMoEConfig` that a model has."""
    if model.is_megatron:
        from maskmoe.conversion.megatron_models import open_megatron

        fields = open_megatron(model.path).config
    else:
        fields = read_json(model.path / _CONFIG_FILE)
        if fields.get("model_type") != _MODEL_TYPE:
            raise UserError(
                f"{model.path} is a model of type {fields.get('model_type')!r}, not {_MODEL_TYPE!r}; convert it with "
                "tools/convert_checkpoint.py hf-to-megatron"
            )
    from maskmoe.huggingface import MaskMoEConfig

    try:
        return MaskMoEConfig(**{name: value for name, value in fields.items() if name != "model_type"}).to_dict()
    # Whatever the class makes of values of wrong types.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{model.path}: its configuration is damaged: {' '.join(str(error).split())}") from error


def tokenizer_sha256(model: ModelSource) -> str | None:
    """Digest of the tokenizer's file that a model was trained with; None if it is not known. Raises UserError."""
    if model.is_megatron:
        from maskmoe.conversion.megatron_models import open_megatron

        return getattr(open_megatron(model.path).args, "tokenizer_sha256", None)
    args = model.path / _MEGATRON_ARGS
    return read_json(args).get("tokenizer_sha256") if args.is_file() else None


@contextmanager
def model_folder(model: ModelSource, conversion: Conversion) -> Iterator[Path]:
    """The folder of a model in transformers' format; a converted one has no tokenizer, and is removed at the end.

    Raises:
        UserError: it cannot be converted, or the disk is full.
    """
    if not model.is_megatron:
        yield model.path
        return
    from maskmoe.conversion.convert import Settings, megatron_to_huggingface
    from maskmoe.conversion.tokenizer import WITHOUT_TEXT

    with _scratch_folder(conversion) as scratch:
        folder = scratch / "model"
        megatron_to_huggingface(Settings(load=model.path, save=folder, tokenizer_type=WITHOUT_TEXT))
        yield folder


@contextmanager
def tokenizer_folder(model: ModelSource, conversion: Conversion) -> Iterator[Path]:
    """A folder with the tokenizer of a model, as transformers reads it; without one if the model has none.

    Raises:
        UserError: the tokenizer is not on this machine, or cannot be expressed in transformers.
    """
    if not model.is_megatron:
        yield model.path
        return
    from maskmoe.conversion.megatron_models import open_megatron
    from maskmoe.conversion.tokenizer import WITHOUT_TEXT, export_tokenizer

    args = open_megatron(model.path).args
    kind = conversion.tokenizer_type or args.tokenizer_type
    path = conversion.tokenizer_model or args.tokenizer_model
    if kind != WITHOUT_TEXT and (path is None or not Path(path).exists()):
        raise UserError(
            f"the tokenizer {path} of {model.path} does not exist; pass --tokenizer-model, or --tokenizer-type "
            f"{WITHOUT_TEXT} to go without"
        )
    with _scratch_folder(conversion) as folder:
        export_tokenizer(kind, path, folder)
        yield folder


@contextmanager
def _scratch_folder(conversion: Conversion) -> Iterator[Path]:
    """A new folder that is removed at the end. Raises UserError where none can be made."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="analyze_routing_", dir=conversion.scratch_dir)
    except OSError as error:
        raise UserError(
            f"cannot make a temporary folder in {conversion.scratch_dir or tempfile.gettempdir()}: {error.strerror}; "
            "choose another --scratch-dir"
        ) from error
    with scratch as folder:
        yield Path(folder)
