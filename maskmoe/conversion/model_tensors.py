"""Lists and checks the tensors of a MaskMoE model in transformers' format, and reads and makes its routing mask."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from maskmoe.conversion.blocks import Block, MemorySource, TensorSource, TensorSpec
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import buffers_of_routing_mask, routing_mask_from_buffers

Shapes = dict[str, tuple[int, ...]]

ROUTING_MASK_PREFIX = "model.routing_mask."

# An error names at most this number of tensors.
_MAX_NAMES = 3


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of a model's tensors by name.

    Args:
        config: the fields of `MaskMoEConfig`.

    Returns:
        the shapes in the order of the layers; the routing mask's tensors come last.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer, mlp_type in enumerate(config["mlp_layer_types"]):
        prefix = f"model.layers.{layer}."
        parts = {
            "input_layernorm.weight": (hidden,),
            **_attention_shapes(config),
            "post_attention_layernorm.weight": (hidden,),
            **(
                _moe_shapes(config)
                if mlp_type == "sparse"
                else _mlp_shapes("mlp.", config["intermediate_size"], hidden)
            ),
        }
        shapes |= {prefix + name: shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    if mask := config["routing_mask"]:
        shapes |= _routing_mask_shapes(mask, config)
    return shapes


def _attention_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of one layer's attention by name in the layer."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: Shapes = {}
    for name, features in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{name}_proj.weight"] = (features, hidden)
        if config["attention_bias"]:
            shapes[f"self_attn.{name}_proj.bias"] = (features,)
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if config["qk_norm"]:
        is_per_head = config["qk_norm"] == "head"
        shapes["self_attn.q_norm.weight"] = (head_dim if is_per_head else queries,)
        shapes["self_attn.k_norm.weight"] = (head_dim if is_per_head else keys,)
    return shapes


def _mlp_shapes(prefix: str, features: int, hidden: int) -> Shapes:
    """Return the shapes of one gated MLP with `features` intermediate features."""
    return {
        f"{prefix}gate_proj.weight": (features, hidden),
        f"{prefix}up_proj.weight": (features, hidden),
        f"{prefix}down_proj.weight": (hidden, features),
    }


def _moe_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of one layer's router, experts and shared expert by name in the layer."""
    hidden, experts, features = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    shapes: Shapes = {"mlp.gate.weight": (experts, hidden)}
    if config["use_expert_bias"]:
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    shapes["mlp.experts.gate_up_proj"] = (experts, 2 * features, hidden)
    shapes["mlp.experts.down_proj"] = (experts, hidden, features)
    if config["shared_expert_intermediate_size"]:
        shapes |= _mlp_shapes("mlp.shared_experts.", config["shared_expert_intermediate_size"], hidden)
        if config["shared_expert_gate"]:
            shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def _routing_mask_shapes(mask: Mapping[str, Any], config: Mapping[str, Any]) -> Shapes:
    tables = mask["num_tables"]
    return {
        f"{ROUTING_MASK_PREFIX}row_of_id": (tables, config["vocab_size"]),
        f"{ROUTING_MASK_PREFIX}visible_bits": (tables, mask["num_rows"], -(-config["num_experts"] // 8)),
        f"{ROUTING_MASK_PREFIX}metadata": (mask["metadata_bytes"],),
    }


def routing_mask_tensors(mask: RoutingMask) -> tuple[MemorySource, dict[str, Any]]:
    """Return a routing mask as the buffers of a model and as the field `routing_mask` of `MaskMoEConfig`."""
    buffers = buffers_of_routing_mask(mask)
    field = {
        "num_tables": len(mask.row_of_id),
        "num_rows": mask.visible_bits.shape[1],
        "row_dtype": str(mask.row_of_id.dtype),
        "metadata_bytes": buffers["metadata"].numel(),
    }
    return MemorySource({ROUTING_MASK_PREFIX + name: buffer for name, buffer in buffers.items()}), field


def read_mask(source: TensorSource, prefix: str) -> RoutingMask | None:
    """Read and verify the routing mask among a source's tensors.

    Args:
        source: the tensors of a model.
        prefix: prefix of the names of the routing mask's tensors.

    Returns:
        the routing mask; None if no tensor has the prefix.

    Raises:
        UserError: the routing mask is damaged or altered.
    """
    names = [name for name in source.tensors if name.startswith(prefix)]
    buffers = {name: source.read(Block.whole(name, source.tensors[name].shape)) for name in names}
    return routing_mask_from_buffers({name.removeprefix(prefix): buffers[name] for name in names}) if names else None


def check_tensors(
    found: Mapping[str, TensorSpec], expected: Shapes, where: str, ignored: Collection[str] = frozenset()
) -> None:
    """Check that a folder holds all tensors of a model, with the right shapes, and no further tensors.

    Args:
        found: the folder's tensors by name.
        expected: shapes of the model's tensors by name.
        where: the folder, for error messages.
        ignored: names of further tensors that the folder may hold.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; names up to three such tensors.
    """
    if missing := expected.keys() - found.keys():
        raise UserError(f"{where} lacks {_join_names(missing)}")
    if surplus := found.keys() - expected.keys() - set(ignored):
        raise UserError(f"{where} holds tensors that its settings do not account for: {_join_names(surplus)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{where}: {name} has the shape {list(found[name].shape)}, it should have {list(shape)}")


def _join_names(names: Iterable[str]) -> str:
    """Join names for an error message; only the first `_MAX_NAMES` are named, the others counted."""
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
