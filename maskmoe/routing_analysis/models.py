"""Finds the models of a series, checks that they are alike, and provides them in transformers' format."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from maskmoe.checkpoint.integrity import LAYOUT_FILE, Damage, check_structure
from maskmoe.checkpoint.series import (
    RELEASE,
    checkpoint_path,
    finished_iterations,
    has_checkpoint,
    iteration_of,
    read_tracker,
)
from maskmoe.conversion.convert import Settings, megatron_to_huggingface
from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.tokenizer import WITHOUT_TEXT, export_tokenizer
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.json_files import read_json
from maskmoe.routing_analysis.settings import Conversion

_CONFIG_FILE = "config.json"
_MODEL_TYPE = "maskmoe"
# The file in which exported models keep Megatron's arguments.
_MEGATRON_ARGS = "megatron/args.json"


@dataclass(frozen=True)
class ModelSource:
    """A model to analyse.

    Attributes:
        path: the folder of the model, a Megatron checkpoint or a model in transformers' format.
        name: the name of the model in results.
        iteration: the iteration of training; None if it is unknown.
        is_megatron: whether the model is a Megatron checkpoint.
    """

    path: Path
    name: str
    iteration: int | None = None
    is_megatron: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The sizes that all models of a series have in common.

    Attributes:
        vocab_size: number of token ids.
        layers: numbers of the layers with experts, from 1.
        num_experts: number of experts in a layer, N.
        topk: number of experts of a token, k.
    """

    vocab_size: int
    layers: tuple[int, ...]
    num_experts: int
    topk: int

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"{self.vocab_size:,} token ids and in layers {layers} top-{self.topk} of {self.num_experts} experts"


def find_models(paths: Sequence[Path], steps: Sequence[int] = ()) -> tuple[ModelSource, ...]:
    """Return the models of a series.

    Args:
        paths: folders in the order of the series. Each is a Megatron checkpoint, a model in transformers' format, or a
            run. A run stands for all its checkpoints in the order of their iterations.
        steps: the iterations to take from each run, in this order; empty for all.

    Raises:
        UserError: a path is not a folder with models, or a checkpoint is missing or damaged.
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
    """The content of a folder: a model in transformers' format, a Megatron checkpoint, or the checkpoints of a run."""

    TRANSFORMERS = auto()
    CHECKPOINT = auto()
    RUN = auto()


def _format_of(path: Path) -> _Format:
    """Recognise the content of a folder. Raises UserError if it is not a model."""
    if not path.is_dir():
        raise UserError(f"--load {path} does not exist, or is not a folder")
    if (path / _CONFIG_FILE).is_file():
        return _Format.TRANSFORMERS
    if (path / LAYOUT_FILE).is_file():
        return _Format.CHECKPOINT
    if has_checkpoint(path):
        return _Format.RUN
    raise UserError(f"--load {path} holds neither Megatron checkpoints nor a model in transformers' format")


def _megatron_model(checkpoint: Path, with_folder: bool) -> ModelSource:
    """Return a checkpoint as a model whose name has the iteration.

    Args:
        checkpoint: the folder of the checkpoint.
        with_folder: whether the name also has the folder of the run, because the series has several folders.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        check_structure(checkpoint)
    except Damage as damage:
        raise UserError(f"{damage}; choose sound checkpoints with --ckpt-step") from damage
    iteration = iteration_of(checkpoint)
    name = checkpoint.name if iteration is None else f"iteration {iteration}"
    return ModelSource(checkpoint, f"{checkpoint.parent} {name}" if with_folder else name, iteration, is_megatron=True)


def _checkpoints_of_run(folder: Path, steps: Sequence[int]) -> list[Path]:
    """Return the checkpoints of a run: at the given steps, or all finished checkpoints in ascending order.

    Raises:
        UserError: the run has no finished checkpoint.
    """
    if steps:
        return [checkpoint_path(folder, step) for step in steps]
    if read_tracker(folder) == RELEASE:
        return [folder / RELEASE]
    finished = finished_iterations(folder)
    if not finished:
        raise UserError(f"--load {folder} holds no finished checkpoint")
    return [checkpoint_path(folder, step) for step in reversed(finished)]


def common_shape(models: Sequence[ModelSource]) -> tuple[ModelShape, int]:
    """Return the shape of all models, and the length of the longest sequence that all models accept.

    Raises:
        UserError: the series is empty, a model cannot be read or has no experts, or the models differ in shape.
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
    """Return the shape of a model with a configuration. Raises UserError if the model has no experts."""
    layers = tuple(number for number, kind in enumerate(config["mlp_layer_types"], start=1) if kind == "sparse")
    if not layers:
        raise UserError(f"{model.path} has no routed experts; name a mixture-of-experts model")
    return ModelShape(config["vocab_size"], layers, config["num_experts"], config["num_experts_per_tok"])


def _read_config(model: ModelSource) -> Mapping[str, Any]:
    """Return the fields of the `MaskMoEConfig` of a model.

    Raises:
        UserError: the configuration is damaged or of another type of model.
    """
    if model.is_megatron:
        fields = open_megatron(model.path).config
    else:
        fields = read_json(model.path / _CONFIG_FILE)
        if fields.get("model_type") != _MODEL_TYPE:
            raise UserError(
                f"{model.path} is a model of type {fields.get('model_type')!r}, not {_MODEL_TYPE!r}; convert it with "
                "tools/convert_checkpoint.py hf-to-megatron"
            )
    try:
        return MaskMoEConfig(**{name: value for name, value in fields.items() if name != "model_type"}).to_dict()
    # `MaskMoEConfig` raises any of these on values of wrong types.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{model.path}: its configuration is damaged: {' '.join(str(error).split())}") from error


def tokenizer_sha256(model: ModelSource) -> str | None:
    """Return the digest of the tokenizer file that a model was trained with; None if the digest is unknown.

    Raises:
        UserError: the model cannot be read.
    """
    if model.is_megatron:
        return getattr(open_megatron(model.path).args, "tokenizer_sha256", None)
    args = model.path / _MEGATRON_ARGS
    return read_json(args).get("tokenizer_sha256") if args.is_file() else None


@contextmanager
def model_folder(model: ModelSource, conversion: Conversion) -> Iterator[Path]:
    """Provide the folder of a model in transformers' format.

    A Megatron checkpoint is converted to a temporary folder without tokenizer, which is removed at the end.

    Raises:
        UserError: the model cannot be converted, or the disk is full.
    """
    if not model.is_megatron:
        yield model.path
        return
    with _scratch_folder(conversion) as scratch:
        folder = scratch / "model"
        megatron_to_huggingface(Settings(load=model.path, save=folder, tokenizer_type=WITHOUT_TEXT))
        yield folder


@contextmanager
def tokenizer_folder(model: ModelSource, conversion: Conversion) -> Iterator[Path]:
    """Provide a folder with the tokenizer of a model in transformers' format; an empty folder for a model without one.

    Raises:
        UserError: the tokenizer is not on this machine, or transformers has no equivalent.
    """
    if not model.is_megatron:
        yield model.path
        return
    args = open_megatron(model.path).args
    assert args is not None  # every Megatron checkpoint has its arguments
    kind = conversion.tokenizer_type or args.tokenizer_type
    path = conversion.tokenizer_model or args.tokenizer_model
    if kind != WITHOUT_TEXT and (path is None or not Path(path).exists()):
        raise UserError(
            f"the tokenizer {path} of {model.path} does not exist; pass --tokenizer-model, or --tokenizer-type "
            f"{WITHOUT_TEXT} to work without a tokenizer"
        )
    with _scratch_folder(conversion) as folder:
        export_tokenizer(kind, path, folder)
        yield folder


@contextmanager
def _scratch_folder(conversion: Conversion) -> Iterator[Path]:
    """Make a folder that is removed at the end. Raises UserError if the folder cannot be made."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="analyze_routing_", dir=conversion.scratch_dir)
    except OSError as error:
        raise UserError(
            f"cannot make a temporary folder in {conversion.scratch_dir or tempfile.gettempdir()}: {error.strerror}; "
            "choose another --scratch-dir"
        ) from error
    with scratch as folder:
        yield Path(folder)
