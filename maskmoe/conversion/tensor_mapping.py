"""Where each tensor of a model is in a `torch_dist` checkpoint: declared once, used both ways."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maskmoe.conversion.blocks import Block, Copy, check_cover
from maskmoe.conversion.model_tensors import Shapes, tensor_shapes

PADDING_PREFIX = "padding."
"""Of tensors that stand beside a transformers model: rows of padding that only Megatron has."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

EXPERT_NORMS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
"""The norm before a layer's experts as Megatron's local modules save it, and as those of Transformer Engine do."""

_MEGATRON_LAYERS = "decoder.layers."
_HUGGINGFACE_LAYERS = "model.layers."
_OF_MODEL = {
    "model.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": OUTPUT_LAYER,
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.routing_mask.row_of_id": "routing_mask.row_of_id",
    "model.routing_mask.visible_bits": "routing_mask.visible_bits",
    "model.routing_mask.metadata": "routing_mask.metadata",
}
_OF_LAYER = {
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
# Megatron has several projections in one tensor.
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
    """How a checkpoint names and shapes tensors, as far as that does not follow from the model.

    Attributes:
        is_stacked: each kind of a layer's tensors is one tensor for all layers, as Megatron has it where layers are
            all alike; otherwise each layer has its own.
        padded_vocab_size: rows of the embedding and of the output layer.
        expert_norms: by which names a layer with experts has the norm before them, see `EXPERT_NORMS`.
    """

    is_stacked: bool
    padded_vocab_size: int
    expert_norms: tuple[str, ...]


@dataclass(frozen=True)
class TensorMapping:
    """All tensors of a model on both sides.

    Attributes:
        huggingface: shapes by name in transformers' format, with those of the padding that goes along.
        megatron: shapes by name in the checkpoint.
        copies: from Megatron's to the others.

    Raises:
        UncoveredTensor: the copies do not use every element of both sides exactly once.
    """

    huggingface: Shapes
    megatron: Shapes
    copies: tuple[Copy, ...]

    def __post_init__(self):
        check_cover(self.huggingface, {copy.target for copy in self.copies})  # a norm may come by two names
        check_cover(self.megatron, (copy.source for copy in self.copies))


def map_tensors(config: Mapping[str, Any], layout: MegatronLayout) -> TensorMapping:
    """The mapping for a model.

    Args:
        config: the fields of `MaskMoEConfig`.
        layout: of the checkpoint.
    """
    shapes = tensor_shapes(config)
    megatron: Shapes = {}
    copies: list[Copy] = []
    for name, shape in list(shapes.items()):
        for checkpoint_shape, copy in _map_tensor(name, shape, config, layout):
            megatron[copy.source.tensor] = checkpoint_shape
            copies.append(copy)
            shapes.setdefault(copy.target.tensor, copy.target.sizes)  # the padding
    return TensorMapping(shapes, megatron, tuple(copies))


def _map_tensor(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], layout: MegatronLayout
) -> Iterator[tuple[tuple[int, ...], Copy]]:
    """Shapes of the checkpoint's tensors that hold a tensor of transformers, and the copies from there."""
    if not name.startswith(_HUGGINGFACE_LAYERS):
        yield from _map_vocabulary(name, shape, layout)
        return
    number, _, name_in_layer = name.removeprefix(_HUGGINGFACE_LAYERS).partition(".")
    layer, num_layers = int(number), config["num_hidden_layers"]
    is_sparse = config["mlp_layer_types"][layer] == "sparse"
    if name_in_layer == _MLP_NORM:
        parts = [_Part(norm, shape) for norm in (layout.expert_norms if is_sparse else EXPERT_NORMS[:1])]
    elif name_in_layer in _QKV:
        parts = list(_qkv_parts(name_in_layer, shape, config))
    elif name_in_layer in _GATED:
        index, checkpoint_name = _GATED[name_in_layer]
        parts = [_Part(checkpoint_name, (2 * shape[0], *shape[1:]), index * shape[0], 0, shape[0])]
    else:
        parts = [_Part(_OF_LAYER[name_in_layer], shape)]
    for part in parts:
        source, target = part.blocks(name, shape)
        if layout.is_stacked:
            stacked = Block(_MEGATRON_LAYERS + part.name, (layer, *source.offsets), (1, *source.sizes))
            yield (num_layers, *part.shape), Copy(stacked, target)
        else:
            source = Block(f"{_MEGATRON_LAYERS}{layer}.{part.name}", source.offsets, source.sizes)
            yield part.shape, Copy(source, target)


def _map_vocabulary(
    name: str, shape: tuple[int, ...], layout: MegatronLayout
) -> Iterator[tuple[tuple[int, ...], Copy]]:
    """As `_map_tensor`, for tensors outside the layers, of which those with a row per id are padded."""
    checkpoint_name = _OF_MODEL[name]
    if checkpoint_name not in (EMBEDDING, OUTPUT_LAYER):
        yield shape, Copy(Block.whole(checkpoint_name, shape), Block.whole(name, shape))
        return
    vocab_size, padded_shape = shape[0], (layout.padded_vocab_size, *shape[1:])
    yield padded_shape, Copy(Block.whole(checkpoint_name, shape), Block.whole(name, shape))
    if layout.padded_vocab_size > vocab_size:
        padding = Block.rows(checkpoint_name, padded_shape, vocab_size, layout.padded_vocab_size)
        yield padded_shape, Copy(padding, Block.whole(PADDING_PREFIX + checkpoint_name, padding.sizes))


@dataclass(frozen=True)
class _Part:
    """Rows of a layer's tensor in transformers' format, and where Megatron has them."""

    name: str
    """of Megatron's tensor in the layer"""
    shape: tuple[int, ...]
    """of that tensor"""
    start: int = 0
    """of the rows in it"""
    own_start: int = 0
    """of the rows in the tensor of transformers"""
    num_rows: int | None = None
    """None: all"""

    def blocks(self, name: str, shape: tuple[int, ...]) -> tuple[Block, Block]:
        """The rows in Megatron's tensor and in the tensor of transformers."""
        num_rows = shape[0] if self.num_rows is None else self.num_rows
        return (
            Block.rows(self.name, self.shape, self.start, self.start + num_rows),
            Block.rows(name, shape, self.own_start, self.own_start + num_rows),
        )


def _qkv_parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Iterator[_Part]:
    """Megatron has, for each group of query heads, these, then their key head, then their value head."""
    projection, checkpoint_name = _QKV[name]
    head_dim, num_groups = config["head_dim"], config["num_key_value_heads"]
    of_group = {"q": config["num_attention_heads"] // num_groups * head_dim, "k": head_dim, "v": head_dim}
    before = {"q": 0, "k": of_group["q"], "v": of_group["q"] + head_dim}[projection]
    num_rows, all_rows = of_group[projection], sum(of_group.values())
    for group in range(num_groups):
        yield _Part(
            checkpoint_name,
            (num_groups * all_rows, *shape[1:]),
            start=group * all_rows + before,
            own_start=group * num_rows,
            num_rows=num_rows,
        )
