"""Maps the tensors of a `torch_dist` checkpoint to the tensors of a transformers model, declared once for both ways."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
# Megatron keeps the query, key and value projections in one tensor, and the gate and up projections in another.
_QKV = {
    f"self_attn.{part}_proj.{kind}": (part, f"self_attention.linear_qkv.{kind}")
    for part in "qkv"
    for kind in ("weight", "bias")
}
_GATED = {
    f"{mlp}.{part}_proj.weight": (index, f"{mlp}.linear_fc1.weight")
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
    """Yield the shapes of the checkpoint's tensors that hold a transformers tensor, with the copies from them."""
    if not name.startswith(_HUGGINGFACE_LAYERS):
        yield from _map_model_tensor(name, shape, layout)
        return
    number, _, name_in_layer = name.removeprefix(_HUGGINGFACE_LAYERS).partition(".")
    layer, num_layers = int(number), config["num_hidden_layers"]
    is_sparse = config["mlp_layer_types"][layer] == "sparse"
    if name_in_layer == _MLP_NORM:
        parts = [_RowRange(norm, shape) for norm in (layout.expert_norms if is_sparse else EXPERT_NORMS[:1])]
    elif name_in_layer in _QKV:
        parts = list(_qkv_rows(name_in_layer, shape, config))
    elif name_in_layer in _GATED:
        index, checkpoint_name = _GATED[name_in_layer]
        parts = [_RowRange(checkpoint_name, (2 * shape[0], *shape[1:]), index * shape[0], 0, shape[0])]
    else:
        parts = [_RowRange(_LAYER_TENSORS[name_in_layer], shape)]
    for part in parts:
        source, target = part.blocks(name, shape)
        if layout.is_stacked:
            stacked = Block(_MEGATRON_LAYERS + part.name, (layer, *source.offsets), (1, *source.sizes))
            yield (num_layers, *part.shape), Copy(stacked, target)
        else:
            source = Block(f"{_MEGATRON_LAYERS}{layer}.{part.name}", source.offsets, source.sizes)
            yield part.shape, Copy(source, target)


def _map_model_tensor(
    name: str, shape: tuple[int, ...], layout: MegatronLayout
) -> Iterator[tuple[tuple[int, ...], Copy]]:
    """Do the same as `_map_tensor` for a tensor outside the layers; pads tensors that have a row for each id."""
    checkpoint_name = _MODEL_TENSORS[name]
    if checkpoint_name not in (EMBEDDING, OUTPUT_LAYER):
        yield shape, Copy(Block.whole(checkpoint_name, shape), Block.whole(name, shape))
        return
    vocab_size, padded_shape = shape[0], (layout.padded_vocab_size, *shape[1:])
    yield padded_shape, Copy(Block.whole(checkpoint_name, shape), Block.whole(name, shape))
    if layout.padded_vocab_size > vocab_size:
        padding = Block.rows(checkpoint_name, padded_shape, vocab_size, layout.padded_vocab_size)
        yield padded_shape, Copy(padding, Block.whole(PADDING_PREFIX + checkpoint_name, padding.sizes))


@dataclass(frozen=True)
class _RowRange:
    """Rows of a layer's tensor in Megatron that hold rows of a tensor in transformers.

    Attributes:
        name: name of Megatron's tensor in the layer.
        shape: shape of Megatron's tensor.
        start: first row in Megatron's tensor.
        huggingface_start: first row in the transformers tensor.
        num_rows: number of rows; None: all rows of the transformers tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    huggingface_start: int = 0
    num_rows: int | None = None

    def blocks(self, name: str, shape: tuple[int, ...]) -> tuple[Block, Block]:
        """Return the rows as a block of Megatron's tensor and as a block of the transformers tensor.

        Args:
            name: name of the transformers tensor.
            shape: shape of the transformers tensor.
        """
        num_rows = shape[0] if self.num_rows is None else self.num_rows
        return (
            Block.rows(self.name, self.shape, self.start, self.start + num_rows),
            Block.rows(name, shape, self.huggingface_start, self.huggingface_start + num_rows),
        )


def _qkv_rows(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Iterator[_RowRange]:
    """Yield the rows of Megatron's fused tensor that hold a query, key or value projection.

    For each group of query heads, the fused tensor holds the query heads, then their key head, then their value head.
    """
    projection, checkpoint_name = _QKV[name]
    head_dim, num_groups = config["head_dim"], config["num_key_value_heads"]
    group_rows = {"q": config["num_attention_heads"] // num_groups * head_dim, "k": head_dim, "v": head_dim}
    offset = {"q": 0, "k": group_rows["q"], "v": group_rows["q"] + head_dim}[projection]
    num_rows, fused_rows = group_rows[projection], sum(group_rows.values())
    for group in range(num_groups):
        yield _RowRange(
            checkpoint_name,
            (num_groups * fused_rows, *shape[1:]),
            start=group * fused_rows + offset,
            huggingface_start=group * num_rows,
            num_rows=num_rows,
        )
