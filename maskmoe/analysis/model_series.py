"""Finds the models of a series, checks that they are alike, and provides them in transformers' format."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmoe.analysis.routing_statistics import AnalysisSettings
from maskmoe.checkpoint import series
from maskmoe.checkpoint.integrity import check_structure, iteration_of
from maskmoe.checkpoint.reading import LAYOUT_FILE, CheckpointError
from maskmoe.conversion.convert import temporary_export
from maskmoe.conversion.import_huggingface import open_model
from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.model_tensors import OpenedModel
from maskmoe.conversion.seal import check_seal
from maskmoe.conversion.settings import CONFIG_FILE, Settings, read_model_config
from maskmoe.conversion.tokenizer import WITHOUT_TEXT, choose_tokenizer, export_tokenizer
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig


@dataclass(frozen=True)
class ModelSource:
    """A model to analyse.

    Attributes:
        path: The folder of the model, a Megatron checkpoint or a model in transformers' format.
        name: The name of the model in results.
        iteration: The iteration of training; None if it is unknown.
        is_megatron: Whether the model is a Megatron checkpoint.
    """

    path: Path
    name: str
    iteration: int | None = None
    is_megatron: bool = False

    def open(self) -> OpenedModel:
        """Open the model, without reading its weights. Raises UserError if the model cannot be read."""
        return open_megatron(self.path) if self.is_megatron else open_model(self.path)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that all models of a series have in common.

    Attributes:
        vocab_size: Number of token ids.
        num_experts: Number of experts in a layer, N.
        topk: Number of experts of a token, k.
        layers: Numbers of the layers with experts, from 1.
    """

    vocab_size: int
    num_experts: int
    topk: int
    layers: tuple[int, ...]

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"{self.vocab_size:,} token ids and in layers {layers} top-{self.topk} of {self.num_experts} experts"


def find_models(paths: Sequence[Path], steps: Sequence[int] = ()) -> tuple[ModelSource, ...]:
    """Return the models of a series, at least one.

    Args:
        paths: Folders in the order of the series. Each is a Megatron checkpoint, a model in transformers' format, or a
            run. A run stands for all its checkpoints in the order of their iterations.
        steps: The iterations to take from each run, in this order; empty for all.

    Raises:
        UserError: A path is not a folder with models, or a checkpoint is missing or damaged.
    """
    models = []
    for path in paths:
        if (path / CONFIG_FILE).is_file():
            model_type = read_model_config(path / CONFIG_FILE).get("model_type")
            if model_type != MaskMoEConfig.model_type:
                raise UserError(
                    f"{path} is a model of type {model_type!r}, not {MaskMoEConfig.model_type!r}; convert it with "
                    "maskmoe convert hf-to-megatron"
                )
            check_seal(path)
            models.append(ModelSource(path, str(path)))
        elif checkpoints := [path] if (path / LAYOUT_FILE).is_file() else _checkpoints_of_run(path, steps):
            models += [_megatron_model(checkpoint, with_folder=len(paths) > 1) for checkpoint in checkpoints]
        else:
            raise UserError(f"--load {path} holds neither Megatron checkpoints nor a model in transformers' format")
    if steps and not any(map(series.has_checkpoint, paths)):
        raise UserError("--ckpt-step chooses among the checkpoints of a folder, but --load names none; leave it out")
    return tuple(models)


def _checkpoints_of_run(folder: Path, steps: Sequence[int]) -> list[Path]:
    """Return the checkpoints of a run: at the given steps, or all finished checkpoints in ascending order.

    The list is empty for a folder that does not belong to a run.

    Raises:
        UserError: The run has no finished checkpoint.
    """
    if not series.has_checkpoint(folder):
        return []
    if series.read_tracker(folder) == series.RELEASE and not steps:
        return [folder / series.RELEASE]
    steps = steps or series.finished_iterations(folder)[::-1]
    if not steps:
        raise UserError(f"--load {folder} holds no finished checkpoint")
    return [series.checkpoint_path(folder, step) for step in steps]


def _megatron_model(checkpoint: Path, with_folder: bool) -> ModelSource:
    """Return a checkpoint as a model whose name has the iteration.

    Args:
        checkpoint: The folder of the checkpoint.
        with_folder: Whether the name also has the folder of the run, because the series has several folders.

    Raises:
        UserError: The checkpoint is damaged.
    """
    try:
        check_structure(checkpoint)
    except CheckpointError as damage:
        raise UserError(f"{damage}; choose sound checkpoints with --ckpt-step") from damage
    iteration = iteration_of(checkpoint)
    name = checkpoint.name if iteration is None else f"iteration {iteration}"
    return ModelSource(checkpoint, f"{checkpoint.parent} {name}" if with_folder else name, iteration, is_megatron=True)


def common_shape(models: Sequence[ModelSource]) -> tuple[ModelShape, int]:
    """Return the shape of all models, and the length of the longest sequence that all models accept.

    Raises:
        UserError: A model cannot be read or has no experts, or the models differ in shape.
    """
    configs = [model.open().config for model in models]
    shapes = [_shape(config) for config in configs]
    for model, shape in zip(models, shapes, strict=True):
        if not shape.layers:
            raise UserError(f"{model.path} has no routed experts; name a mixture-of-experts model")
        if shape != shapes[0]:
            alike = f"{models[0].path} has {shapes[0]}, and {model.path} has {shape}"
            raise UserError(f"the models of a series must be alike, but {alike}")
    return shapes[0], min(config["max_position_embeddings"] for config in configs)


def _shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a model with the fields of a `MaskMoEConfig`."""
    layers = tuple(number for number, kind in enumerate(config["mlp_layer_types"], start=1) if kind == "sparse")
    return ModelShape(config["vocab_size"], config["num_experts"], config["num_experts_per_tok"], layers)


@contextmanager
def model_folder(model: ModelSource) -> Iterator[Path]:
    """Provide the folder of a model in transformers' format.

    A Megatron checkpoint is converted to a temporary folder without tokenizer, which is removed at the end.

    Raises:
        UserError: The model cannot be converted, or the disk is full.
    """
    if not model.is_megatron:
        yield model.path
        return
    with temporary_export(model.path, tokenizer_type=WITHOUT_TEXT) as folder:
        yield folder


@contextmanager
def tokenizer_folder(model: ModelSource, settings: AnalysisSettings) -> Iterator[Path]:
    """Provide a folder with the tokenizer of a model in transformers' format; an empty folder for a model without one.

    Raises:
        UserError: The tokenizer is not on this machine, the model was trained with another one, or transformers has
            no equivalent.
    """
    if not model.is_megatron:
        yield model.path
        return
    with tempfile.TemporaryDirectory(prefix="analyze_routing_") as folder:
        chosen = {"tokenizer_type": settings.tokenizer_type, "tokenizer_model": settings.tokenizer_model}
        export_tokenizer(
            *choose_tokenizer(model.open().args, Settings(model.path, Path(folder), **chosen)), Path(folder)
        )
        yield Path(folder)
