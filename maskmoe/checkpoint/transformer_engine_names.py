"""Loads checkpoints of Megatron's local modules into Transformer Engine's modules, and the other way round."""

from collections.abc import Collection
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

NORM_BEFORE_EXPERTS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
"""Prefix of the norm before a layer's experts: as Megatron's local modules save it, and as Transformer Engine's do."""

_FP8_STATE = "._extra_state"


def request_saved_names(state: dict[str, Any], saved: Collection[str]) -> None:
    """Change a request to load a checkpoint, in place, so that it asks for the names that the checkpoint has.

    The norm before experts is the only tensor whose name depends on the implementation. Its optimizer state has the
    same name with a prefix. Transformer Engine's norms also have a state of FP8, which local modules do not save. If
    the checkpoint has no such state, the module keeps its own, which is empty without FP8.

    Args:
        state: the model's and the optimizer's sharded state, as Megatron generates it for loading.
        saved: the names of all entries of the checkpoint.
    """

    def request(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor) and entry.key not in saved:
            entry.key = next((name for name in _other_names(entry.key) if name in saved), entry.key)
        elif isinstance(entry, ShardedObject) and entry.key.endswith(_FP8_STATE) and entry.unique_key not in saved:
            return LocalNonpersistentObject(entry.data)
        return entry

    dict_list_map_inplace(request, state)


def _other_names(name: str) -> list[str]:
    """Return the names that other implementations give to a tensor."""
    local, transformer_engine = NORM_BEFORE_EXPERTS
    pairs = ((local, transformer_engine), (transformer_engine, local))
    return [name.replace(own, other) for own, other in pairs if own in name]
