"""Loads checkpoints of other implementations of a model: GPT as hybrid, local modules as Transformer Engine's."""

import re
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
    GPTCompatLayerMaps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject, ShardedTensor
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern

# Layers that no GPT model has.
_NEW_LAYERS = (Symbols.MAMBA, Symbols.GDN)
_FINAL_NORM = ("decoder.final_norm.", "decoder.final_layernorm.")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_LAYER_OF_PREDICTION = re.compile(r"\.mtp_model_layer\.layers\.\d+\.")


@dataclass(frozen=True)
class EquivalentGPT:
    """The GPT model that has the attention, MLPs and MoE layers of a hybrid model.

    A transformer layer of the GPT model is an attention symbol and the `-` or `E` after it. Mamba and GDN layers have
    no counterpart.

    Attributes:
        layer_of_symbol: The transformer layer, from 0, of each layer of the hybrid decoder; None without counterpart.
        has_alike_layers: Whether checkpoints of the GPT model have one tensor for all layers, instead of one for each.
    """

    layer_of_symbol: tuple[int | None, ...]
    has_alike_layers: bool

    @classmethod
    def of_pattern(cls, pattern: str, has_alike_layers: bool) -> Self:
        """Return the equivalent of a hybrid model; see `without_new_layers` for the patterns that have one."""
        symbols = (parse_hybrid_pattern(pattern).main_pattern or "").replace(Symbols.PIPE, "")
        layers, num_found = [], 0
        for symbol in symbols:
            layers.append(None if symbol in _NEW_LAYERS else num_found // 2)
            num_found += symbol not in _NEW_LAYERS
        return cls(tuple(layers), has_alike_layers)

    def maps(self) -> GPTCompatLayerMaps:
        """Return the layers in Megatron-Core's form."""
        pairs = [(symbol, layer) for symbol, layer in enumerate(self.layer_of_symbol) if layer is not None]
        new = frozenset(symbol for symbol, layer in enumerate(self.layer_of_symbol) if layer is None)
        return GPTCompatLayerMaps(dict(pairs[::2]), dict(pairs[1::2]), new, num_gpt_layers=len(pairs) // 2)


def request_names_of_gpt_model(state: dict[str, Any], gpt_model: EquivalentGPT) -> None:
    """Change the request of a hybrid model or its optimizer, in place, to the names that a GPT model saves.

    Layers without counterpart, and their optimizer states, keep their initial values.
    """
    if gpt_model.has_alike_layers:
        retarget_sharded_state_dict_to_gpt_checkpoint(state, gpt_model.maps())

    def request(entry: Any) -> Any:
        if not isinstance(entry, ShardedBase):
            return entry
        match = _LAYER.search(entry.key)
        if match is not None:
            layer = gpt_model.layer_of_symbol[int(match[1])]
            if layer is None:
                return LocalNonpersistentObject(entry.data)
            entry.key = f"{entry.key[: match.start()]}decoder.layers.{layer}.{entry.key[match.end() :]}"
        entry.key = _LAYER_OF_PREDICTION.sub(".transformer_layer.", entry.key.replace(*_FINAL_NORM))
        return entry

    dict_list_map_inplace(request, state)


def find_equivalent_gpt(args: Namespace, saved_args: Namespace, model: object) -> tuple[EquivalentGPT | None, bool]:
    """Do what Megatron's `_maybe_setup_gpt_to_hybrid_load` does, for every pattern that has an equivalent GPT model.

    Returns:
        The equivalent GPT model, or None if no checkpoint of one is loaded into a hybrid model; and whether to load the
        state of the optimizer, too.

    Raises:
        RuntimeError: The checkpoint of a hybrid model would be loaded into a GPT model.
    """
    saved = saved_pattern(saved_args)
    if saved and args.hybrid_layer_pattern is None:
        raise RuntimeError(f"the checkpoint holds a hybrid model: pass --hybrid-layer-pattern '{saved}'")
    if saved or args.hybrid_layer_pattern is None:
        return None, False
    gpt_model = EquivalentGPT.of_pattern(args.hybrid_layer_pattern, has_alike_layers(saved_args))
    has_optimizer = not getattr(saved_args, "no_save_optim", False)
    return gpt_model, has_optimizer and not (args.no_load_optim or args.finetune)


def saved_pattern(args: Namespace) -> str | None:
    """Return the pattern of a saved hybrid model, which earlier Megatron versions call `hybrid_override_pattern`."""
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)


def has_alike_layers(args: Namespace) -> bool:
    """Return whether Megatron saves one tensor for all layers of a GPT model, as opposed to one for each layer."""
    frequency = getattr(args, "moe_layer_freq", 1)
    return isinstance(frequency, int) and frequency <= 1


def without_new_layers(pattern: str) -> str:
    """Return a pattern without bounds of stages, and without the layers that no GPT model has."""
    decoder, *predictions = pattern.replace(Symbols.PIPE, "").split(Symbols.MTP_SEPARATOR)
    return Symbols.MTP_SEPARATOR.join(["".join(s for s in decoder if s not in _NEW_LAYERS), *predictions])


NORM_BEFORE_EXPERTS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
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
            entry.key = next((name for name in _other_names(entry.key) if name in saved), entry.key)
        if isinstance(entry, ShardedTensor) and entry.dtype is torch.int16 and entry.data is not None:
            entry.data, entry.dtype = entry.data.int(), torch.int32
        if isinstance(entry, ShardedObject) and entry.key.endswith(_FP8_STATE) and entry.unique_key not in saved:
            return LocalNonpersistentObject(entry.data)
        return entry

    dict_list_map_inplace(request, state)


def _other_names(name: str) -> list[str]:
    """Return the names that other implementations give to a tensor."""
    local, transformer_engine = NORM_BEFORE_EXPERTS
    pairs = ((local, transformer_engine), (transformer_engine, local))
    return [name.replace(own, other) for own, other in pairs if own in name]
