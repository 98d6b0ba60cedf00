"""Maps the tensors of a `torch_dist` checkpoint to the tensors of a transformers model, declared once for both ways."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from maskmoe.conversion.blocks import Block, Copy, check_cover
from maskmoe.conversion.model_tensors import Shapes, tensor_shapes

PADDING_PREFIX = "padding."
"""Prefix of tensors kept beside a transformers model: the rows of padding that only Megatron has."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

EXPERT_NORMS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
"""Names of the norm before a layer's experts: as Megatron's local modules save it, and as Transformer Engine's do."""

_MEGATRON_LAYERS = "decoder.layers."
_HUGGINGFACE_LAYERS = "model.layers."
_MODEL_TENSORS = {
    "model.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": OUTPUT_LAYER,
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.routing_mask.row_of_id": "routing_mask.row_of_id",
    "model.routing_mask.visible_bits": "routing_mask.visible_bits",
    "model.routing_mask.metadata": "routing_mask.metadata",
}
_LAYER_TENSORS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
    "mlp.experts.gate_up_proj": "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.down_proj": "mlp.experts.experts.linear_fc2.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
}
# Megatron keeps the query, key and value projections in one tensor, and the gate and up projections in another. These
# tables hold the tensor's name and which of its parts the projection is.
_QKV = {
    f"self_attn.{part}_proj.{kind}": ((f"self_attention.linear_qkv.{kind}",), index)
    for index, part in enumerate("qkv")
    for kind in ("weight", "bias")
}
_GATED = {
    f"{mlp}.{part}_proj.weight": ((f"{mlp}.linear_fc1.weight",), index)
    for mlp in ("mlp", "mlp.shared_experts")
    for index, part in enumerate(("gate", "up"))
}
_MLP_NORM = "post_attention_layernorm.weight"


@dataclass(frozen=True)
class MegatronLayout:
    """The names and shapes of a checkpoint's tensors, as far as they do not follow from the model.

    Attributes:
        is_stacked: one tensor holds a parameter of all layers, as Megatron saves it if all layers are alike; otherwise
            each layer has its own tensor.
        padded_vocab_size: number of rows of the embedding and of the output layer.
        expert_norms: the names, out of `EXPERT_NORMS`, under which the checkpoint holds the norm before experts.
    """

    is_stacked: bool
    padded_vocab_size: int
    expert_norms: tuple[str, ...]


@dataclass(frozen=True)
class TensorMapping:
    """All tensors of a model in both formats.

    Attributes:
        huggingface: shapes by name in transformers' format, including the padding of the vocabulary.
        megatron: shapes by name in the checkpoint.
        copies: copies from the checkpoint's tensors to the transformers tensors.

    Raises:
        CoverageError: the copies do not use every element of both formats exactly once.
    """

    huggingface: Shapes
    megatron: Shapes
    copies: tuple[Copy, ...]

    def __post_init__(self) -> None:
        # A set, since a norm that Megatron holds under two names is copied to one tensor twice.
        check_cover(self.huggingface, {copy.target for copy in self.copies})
        check_cover(self.megatron, (copy.source for copy in self.copies))


def map_tensors(config: Mapping[str, Any], layout: MegatronLayout) -> TensorMapping:
    """Return the mapping of a model's tensors.

    Args:
        config: the fields of `MaskMoEConfig`.
        layout: the layout of the checkpoint.
    """
    shapes = tensor_shapes(config)
    megatron: Shapes = {}
    copies: list[Copy] = []
    for name, shape in list(shapes.items()):
        for checkpoint_shape, copy in _map_tensor(name, shape, config, layout):
            megatron[copy.source.tensor] = checkpoint_shape
            copies.append(copy)
            shapes.setdefault(copy.target.tensor, copy.target.sizes)  # adds the padding's tensors
    return TensorMapping(shapes, megatron, tuple(copies))


def _map_tensor(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], layout: MegatronLayout
) -> Iterator[tuple[tuple[int, ...], Copy]]:
    """Yield the shapes of the checkpoint's tensors that hold a transformers tensor, with the copies from them.

    The rows of a checkpoint's tensor form groups, and each group holds rows of all fused parts, one part after the
    other. Most tensors are one part in one group.
    """
    if not name.startswith(_HUGGINGFACE_LAYERS):
        yield from _map_model_tensor(name, shape, layout)
        return
    number, _, name_in_layer = name.removeprefix(_HUGGINGFACE_LAYERS).partition(".")
    layer, num_groups, rows_of_parts, index = int(number), 1, [shape[0]], 0
    if name_in_layer == _MLP_NORM:
        is_sparse = config["mlp_layer_types"][layer] == "sparse"
        checkpoint_names = layout.expert_norms if is_sparse else EXPERT_NORMS[:1]
    elif name_in_layer in _QKV:
        # A group has some query heads, then their key head, then their value head.
        checkpoint_names, index = _QKV[name_in_layer]
        num_groups, head_dim = config["num_key_value_heads"], config["head_dim"]
        rows_of_parts = [config["num_attention_heads"] // num_groups * head_dim, head_dim, head_dim]
    elif name_in_layer in _GATED:
        checkpoint_names, index = _GATED[name_in_layer]
        rows_of_parts = [shape[0], shape[0]]
    else:
        checkpoint_names = (_LAYER_TENSORS[name_in_layer],)
    num_rows, first, group_rows = rows_of_parts[index], sum(rows_of_parts[:index]), sum(rows_of_parts)
    checkpoint_shape = (num_groups * group_rows, *shape[1:])
    for checkpoint_name, group in product(checkpoint_names, range(num_groups)):
        start = group * group_rows + first
        source = Block.rows(checkpoint_name, checkpoint_shape, start, start + num_rows)
        target = Block.rows(name, shape, group * num_rows, (group + 1) * num_rows)
        if layout.is_stacked:
            stacked = Block(_MEGATRON_LAYERS + checkpoint_name, (layer, *source.offsets), (1, *source.sizes))
            yield (config["num_hidden_layers"], *checkpoint_shape), Copy(stacked, target)
        else:
            single = Block(f"{_MEGATRON_LAYERS}{layer}.{checkpoint_name}", source.offsets, source.sizes)
            yield checkpoint_shape, Copy(single, target)


def _map_model_tensor(
    name: str, shape: tuple[int, ...], layout: MegatronLayout
) -> Iterator[tuple[tuple[int, ...], Copy]]:
    """Do the same as `_map_tensor` for a tensor outside the layers; pads tensors that have a row for each id."""
    checkpoint_name, num_rows = _MODEL_TENSORS[name], shape[0]
    padded_rows = layout.padded_vocab_size if checkpoint_name in (EMBEDDING, OUTPUT_LAYER) else num_rows
    padded_shape = (padded_rows, *shape[1:])
    yield padded_shape, Copy(Block.whole(checkpoint_name, shape), Block.whole(name, shape))
    if padded_rows > num_rows:
        padding = Block.rows(checkpoint_name, padded_shape, num_rows, padded_rows)
        yield padded_shape, Copy(padding, Block.whole(PADDING_PREFIX + checkpoint_name, padding.sizes))
