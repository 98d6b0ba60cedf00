"""Loads checkpoints of other implementations of a model: GPT as hybrid, local modules as Transformer Engine's."""

import re
from argparse import Namespace
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
    GPTCompatLayerMaps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject, ShardedTensor

_FINAL_NORM = ("decoder.final_norm.", "decoder.final_layernorm.")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_LAYER_OF_PREDICTION = re.compile(r"\.mtp_model_layer\.layers\.\d+\.")


class GPTTwin(NamedTuple):
    """The GPT model with the layers of a hybrid model: one layer for attention and the `-` or `E` after it.

    Attributes:
        num_layers: The number of transformer layers.
        has_alike_layers: Whether checkpoints of the GPT model have one tensor for all layers, instead of one for each.
    """

    num_layers: int
    has_alike_layers: bool


def request_names_of_gpt_model(state: dict[str, Any], twin: GPTTwin) -> None:
    """Change the request of a hybrid model or its optimizer, in place, to the names that its GPT twin saves."""
    if twin.has_alike_layers:
        layers = range(twin.num_layers)
        attention, feed_forward = {2 * layer: layer for layer in layers}, {2 * layer + 1: layer for layer in layers}
        maps = GPTCompatLayerMaps(attention, feed_forward, frozenset(), twin.num_layers)
        retarget_sharded_state_dict_to_gpt_checkpoint(state, maps)

    def request(entry: Any) -> Any:
        if isinstance(entry, ShardedBase):
            name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) // 2}.", entry.key)
            entry.key = _LAYER_OF_PREDICTION.sub(".transformer_layer.", name.replace(*_FINAL_NORM))
        return entry

    dict_list_map_inplace(request, state)


def find_gpt_twin(args: Namespace, saved_args: Namespace, model: object) -> tuple[GPTTwin | None, bool]:
    """Do what Megatron's `_maybe_setup_gpt_to_hybrid_load` does, for every pattern of a GPT model's layers.

    `maskmoe.training.resume.changed_settings` has refused checkpoints of other layers.

    Returns:
        The GPT twin of this run's hybrid model, or None if the checkpoint does not hold a GPT model for a hybrid one;
        and whether to load the state of the optimizer, too.
    """
    if saved_pattern(saved_args) or args.hybrid_layer_pattern is None:
        return None, False
    twin = GPTTwin(args.num_layers // 2, has_alike_layers(saved_args))
    has_optimizer = not getattr(saved_args, "no_save_optim", False)
    return twin, has_optimizer and not (args.no_load_optim or args.finetune)


def saved_pattern(args: Namespace) -> str | None:
    """Return the pattern of a saved hybrid model, which earlier Megatron versions call `hybrid_override_pattern`."""
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)


def has_alike_layers(args: Namespace) -> bool:
    """Return whether Megatron saves one tensor for all layers of a GPT model, as opposed to one for each layer."""
    frequency = getattr(args, "moe_layer_freq", 1)
    return isinstance(frequency, int) and frequency <= 1


_NORM_BEFORE_EXPERTS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
"""Prefix of the norm before a layer's experts: as Megatron's local modules save it, and as Transformer Engine's do."""

_FP8_STATE = "._extra_state"


def request_saved_names(state: dict[str, Any], saved: Collection[str]) -> None:
    """Change a request to load a checkpoint, in place, so that it asks for the names that the checkpoint has.

    The norm before experts is the only tensor whose name depends on the implementation. Its optimizer state has the
    same name with a prefix. If the checkpoint has no FP8 state of Transformer Engine's norms, the module keeps its own.

    Integers of 16 bits, which ranks cannot send each other, are requested as integers of 32 bits.
    """

    def request(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor) and entry.key not in saved:
            for own, other in (_NORM_BEFORE_EXPERTS, _NORM_BEFORE_EXPERTS[::-1]):
                if (name := entry.key.replace(own, other)) in saved:
                    entry.key = name
        if isinstance(entry, ShardedTensor) and entry.dtype is torch.int16 and entry.data is not None:
            entry.data, entry.dtype = entry.data.int(), torch.int32
        if isinstance(entry, ShardedObject) and entry.key.endswith(_FP8_STATE) and entry.unique_key not in saved:
            return LocalNonpersistentObject(entry.data)
        return entry

    dict_list_map_inplace(request, state)
