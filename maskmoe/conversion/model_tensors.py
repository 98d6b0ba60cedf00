"""Models in transformers' format whose tensors are read on demand: names, shapes and the routing mask."""

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from maskmoe.checkpoint.read_routing_mask import buffers_of_routing_mask, routing_mask_from_buffers
from maskmoe.conversion.tensor_sources import (
    Block,
    JoinedSource,
    MemorySource,
    TensorSource,
    TensorSpec,
)
from maskmoe.errors import UserError, listed
from maskmoe.files.parsing import reading
from maskmoe.huggingface import MaskMoEConfig, MaskMoEForCausalLM
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask

Shapes = dict[str, tuple[int, ...]]

ROUTING_MASK_PREFIX = "model.routing_mask."
_MAX_NAMES = 3  # of tensors in an error


def make_config[C: PreTrainedConfig](
    config_class: type[C], fields: Mapping[str, Any], where: object = "the model"
) -> C:
    """Build a configuration of transformers.

    Args:
        config_class: The class of the configuration.
        fields: The fields, as `config.json` holds them.
        where: What has the fields, for error messages.

    Raises:
        UserError: The fields do not form a valid configuration.
    """
    with reading(f"{where}, as a configuration of {config_class.model_type},"):
        return config_class.from_dict(dict(fields))


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of a model's tensors by name, as transformers makes them on a device without memory.

    Args:
        config: The fields of `MaskMoEConfig`.

    Returns:
        The shapes in the order of the layers; the routing mask's tensors come last.

    Raises:
        UserError: The fields do not form a valid configuration.
    """
    with torch.device("meta"):
        model = MaskMoEForCausalLM(make_config(MaskMoEConfig, config))
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mask_shapes = {name: shapes.pop(name) for name in list(shapes) if name.startswith(ROUTING_MASK_PREFIX)}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes | (mask_shapes if config["routing_mask"] else {})


def mtp_tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors of multi-token prediction by name, which transformers does not load.

    The names are DeepSeek-V3's: the layers are numbered after the decoder's. Each of them is like the last of these.

    Args:
        config: The fields of `MaskMoEConfig`.

    Raises:
        UserError: The fields do not form a valid configuration.
    """
    num_layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    modules = range(num_layers, num_layers + make_config(MaskMoEConfig, config).num_mtp_modules)
    if not modules:
        return {}
    last = f"model.layers.{num_layers - 1}."
    layer = {name.removeprefix(last): shape for name, shape in tensor_shapes(config).items() if name.startswith(last)}
    layer |= {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
    layer |= {"shared_head.norm.weight": (hidden,)}
    return {f"model.layers.{number}.{name}": shape for number in modules for name, shape in layer.items()}


def expert_projections(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, str, Block]]:
    """Yield where a tensor that stacks all experts of a layer holds each projection of each expert.

    Args:
        name: Name of the tensor, which ends with `gate_up_proj` or `down_proj`.
        shape: Shape of the tensor.

    Yields:
        Number of the expert, its projection "gate", "up" or "down", and the block of the tensor.
    """
    projections = ("down",) if name.endswith("down_proj") else ("gate", "up")
    num_experts, rows, columns = shape[0], shape[1] // len(projections), shape[2]
    for expert, (part, projection) in product(range(num_experts), enumerate(projections)):
        yield expert, projection, Block(name, (expert, part * rows, 0), (1, rows, columns))


def routing_mask_tensors(
    mask: RoutingMask, prefix: str = ROUTING_MASK_PREFIX, for_megatron: bool = False
) -> tuple[MemorySource, dict[str, Any]]:
    """Return a routing mask as tensors with prefixed names, and as the field `routing_mask` of `MaskMoEConfig`.

    In transformers' format, rows are int32: data parallelism broadcasts the tensors of a file, and neither NCCL nor
    gloo broadcasts int16. In Megatron's checkpoints, rows have the type that `RoutingMask` stores.
    """
    buffers = buffers_of_routing_mask(mask)
    if not for_megatron:
        buffers["row_of_id"] = buffers["row_of_id"].int()
    field = {
        "num_tables": len(mask.row_of_id),
        "num_rows": mask.visible_bits.shape[1],
        "row_dtype": str(mask.row_of_id.dtype),
        "metadata_bytes": buffers["metadata"].numel(),
        "sha256": mask.digest,
    }
    return MemorySource({prefix + name: buffer for name, buffer in buffers.items()}), field


def read_mask(source: TensorSource, prefix: str) -> RoutingMask | None:
    """Read and verify the routing mask among a source's tensors.

    Args:
        source: The tensors of a model.
        prefix: Prefix of the names of the routing mask's tensors.

    Returns:
        The routing mask; None if no tensor has the prefix.

    Raises:
        UserError: The routing mask is damaged or altered.
    """
    names = [name for name in source.tensors if name.startswith(prefix)]
    buffers = {name: source.read(Block.whole(name, source.tensors[name].shape)) for name in names}
    return routing_mask_from_buffers({name.removeprefix(prefix): buffers[name] for name in names}) if names else None


def check_tensors(
    found: Mapping[str, TensorSpec], expected: Shapes, where: str, ignored: Collection[str] = frozenset()
) -> None:
    """Check that a folder holds all tensors of a model, with the right shapes, and no further tensors.

    Args:
        found: The folder's tensors by name.
        expected: Shapes of the model's tensors by name.
        where: The folder, for error messages.
        ignored: Names of further tensors that the folder may hold.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape; names up to three such tensors.
    """
    if missing := expected.keys() - found.keys():
        raise UserError(f"{where} lacks {listed(sorted(missing), _MAX_NAMES)}")
    if surplus := found.keys() - expected.keys() - set(ignored):
        raise UserError(
            f"{where} holds tensors that its settings do not account for: {listed(sorted(surplus), _MAX_NAMES)}"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{where}: {name} has the shape {list(found[name].shape)}, it should have {list(shape)}")


@dataclass(frozen=True)
class OpenedModel:
    """A MaskMoE model in transformers' format whose tensors are read on demand.

    Attributes:
        source: Provides the tensors, by their names in `MaskMoEForCausalLM`, and those of multi-token prediction.
        config: The fields of the model's `MaskMoEConfig`.
        args: Megatron's arguments that the model was trained with; None if they are unknown.
    """

    source: TensorSource
    config: dict[str, Any]
    args: Namespace | None = None


def feed_forward_layers(config: Mapping[str, Any]) -> FeedForwardLayers:
    """Return the feed-forward layers of a model with the fields of a `MaskMoEConfig`."""
    decoder = tuple(kind == "sparse" for kind in config["mlp_layer_types"])
    return FeedForwardLayers(decoder, decoder[-1:] * config["num_nextn_predict_layers"])


def with_routing_mask(model: OpenedModel, mask: RoutingMask | None = None) -> OpenedModel:
    """Add a routing mask to a model with experts that has none; by default every id sees every expert.

    A model may have more rows in the embedding than its tokenizer has ids; the mask is then extended to these rows.

    Raises:
        UserError: The mask does not fit the model.
    """
    config, layers = model.config, feed_forward_layers(model.config)
    if mask is None:
        recipe = MaskRecipe.from_preset("smoe", config["num_experts"], len(layers.has_experts), shared_table=True)
        mask = build_routing_mask(recipe, vocab_size=config["vocab_size"])
    if (num_additional := config["vocab_size"] - mask.vocab_size) > 0:
        # The additional ids see the same experts as the tokenizer's last id.
        row_of_id = np.pad(mask.row_of_id, ((0, 0), (0, num_additional)), mode="edge")
        mask = replace(mask, row_of_id=row_of_id, vocab_size=config["vocab_size"])
    mask.check_fits(vocab_size=config["vocab_size"], num_experts=config["num_experts"], layers=layers)
    mask_source, mask_field = routing_mask_tensors(mask)
    source = JoinedSource(mask_source, model.source)
    return OpenedModel(source, config | {"routing_mask": mask_field}, model.args)
