"""A model whose tensors are read on demand, and the routing mask that it may get."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskmoe.conversion.model_tensors import routing_mask_tensors
from maskmoe.conversion.tensor_sources import JoinedSource, TensorSource
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class OpenedModel:
    """A MaskMoE model in transformers' format whose tensors are read on demand.

    Attributes:
        source: provides the tensors, by their names in `MaskMoEForCausalLM`, and those of multi-token prediction.
        config: the fields of the model's `MaskMoEConfig`.
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
        UserError: the mask does not fit the model.
    """
    config, layers = model.config, feed_forward_layers(model.config)
    if mask is None:
        recipe = MaskRecipe.from_preset("smoe", config["num_experts"], len(layers.has_experts), shared_table=True)
        mask = build_routing_mask(recipe, vocab_size=config["vocab_size"])
    if mask.vocab_size < config["vocab_size"]:
        mask = mask.with_vocab_size(config["vocab_size"])
    mask.check_fits(vocab_size=config["vocab_size"], num_experts=config["num_experts"], layers=layers)
    mask_source, mask_field = routing_mask_tensors(mask)
    return OpenedModel(JoinedSource(model.source, mask_source), config | {"routing_mask": mask_field})
