"""Maps the tensors of a `torch_dist` checkpoint to the tensors of a transformers model, declared once for both ways."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maskmoe.conversion.model_tensors import Shapes, mtp_tensor_shapes, tensor_shapes
from maskmoe.conversion.tensor_sources import Block, Copy, check_cover

PADDING_PREFIX = "padding."
"""Prefix of tensors kept beside a transformers model: the rows of padding that only Megatron has."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

EXPERT_NORMS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
"""Names of the norm before a layer's experts: as Megatron's local modules save it, and as Transformer Engine's do."""

_MEGATRON_LAYERS = "decoder.layers."
_HUGGINGFACE_LAYERS = "model.layers."
_MTP_LAYERS = "mtp.layers."
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
# These names replace others in layers with multi-latent attention, which keeps each projection in a tensor of its own.
_LATENT_ATTENTION_TENSORS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.q_proj.norm.weight": "self_attention.linear_q_proj.layer_norm_weight",
    "self_attn.q_proj.weight": "self_attention.linear_q_proj.weight",
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
}
_MTP_TENSORS = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "final_layernorm.weight",
}
# Megatron keeps the query, key and value projections in one tensor, and the gate and up projections in another. These
# tables hold the tensor's name and which of its parts the projection is.
_QKV = {
    f"self_attn.{part}_proj.{kind}": (f"self_attention.linear_qkv.{kind}", index)
    for index, part in enumerate("qkv")
    for kind in ("weight", "bias")
}
_GATED = {
    f"{mlp}.{part}_proj.weight": (f"{mlp}.linear_fc1.weight", index)
    for mlp in ("mlp", "mlp.shared_experts")
    for index, part in enumerate(("gate", "up"))
}
_MLP_NORM = "post_attention_layernorm.weight"
# Names of modules in checkpoints of GPT models that have other names in checkpoints of hybrid models.
_DECODER_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_PREDICTION_LAYER = re.compile(r"(mtp\.layers\.\d+\.)transformer_layer\.")
_FINAL_NORM = "decoder.final_layernorm."
_FEED_FORWARD_MODULES = ("mlp.", "pre_mlp_layernorm.")


@dataclass(frozen=True)
class MegatronLayout:
    """The names and shapes of a checkpoint's tensors, as far as they do not follow from the model.

    Attributes:
        is_stacked: One tensor holds a parameter of all layers, as Megatron saves it if all layers are alike; otherwise
            each layer has its own tensor.
        padded_vocab_size: Number of rows of the embedding and of the output layer.
        expert_norm: The name, out of `EXPERT_NORMS`, under which the checkpoint holds the norm before experts in layers
            with grouped-query attention. Training loads either.
        is_hybrid: The names are a hybrid model's; such a checkpoint is never stacked.
    """

    is_stacked: bool
    padded_vocab_size: int
    expert_norm: str = EXPERT_NORMS[0]
    is_hybrid: bool = False

    def name(self, name_in_gpt_model: str) -> str:
        """Return the checkpoint's name of a tensor or an object, by its name in a GPT model's checkpoint."""
        return name_in_hybrid_model(name_in_gpt_model) if self.is_hybrid else name_in_gpt_model


@dataclass(frozen=True)
class TensorMapping:
    """All tensors of a model in both formats.

    Attributes:
        huggingface: Shapes by name in transformers' format, including multi-token prediction and the padding of the
            vocabulary.
        megatron: Shapes by name in the checkpoint.
        copies: Copies from the checkpoint's tensors to the transformers tensors.

    Raises:
        CoverageError: The copies do not use every element of both formats exactly once.
    """

    huggingface: Shapes
    megatron: Shapes
    copies: tuple[Copy, ...]

    def __post_init__(self) -> None:
        check_cover(self.huggingface, (copy.target for copy in self.copies))
        check_cover(self.megatron, (copy.source for copy in self.copies))


def map_tensors(config: Mapping[str, Any], layout: MegatronLayout) -> TensorMapping:
    """Return the mapping of a model's tensors.

    Args:
        config: The fields of `MaskMoEConfig`.
        layout: The layout of the checkpoint.
    """
    shapes = tensor_shapes(config) | mtp_tensor_shapes(config)
    megatron: Shapes = {}
    copies: list[Copy] = []
    for name, shape in list(shapes.items()):
        for checkpoint_shape, copy in _map_tensor(name, shape, config, layout):
            source = replace(copy.source, tensor=layout.name(copy.source.tensor))
            megatron[source.tensor] = checkpoint_shape
            copies.append(replace(copy, source=source))
            shapes.setdefault(copy.target.tensor, copy.target.sizes)  # adds the padding's tensors
    return TensorMapping(shapes, megatron, tuple(copies))


def _map_tensor(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], layout: MegatronLayout
) -> Iterator[tuple[tuple[int, ...], Copy]]:
    """Yield the shapes of the checkpoint's tensors that hold a transformers tensor, with the copies from them.

    The names are those in the checkpoint of a GPT model.

    The rows of a checkpoint's tensor form groups, and each group holds rows of all fused parts, one part after the
    other. Most tensors are one part in one group.
    """
    if not name.startswith(_HUGGINGFACE_LAYERS):
        yield from _map_model_tensor(name, shape, layout)
        return
    number, _, name_in_layer = name.removeprefix(_HUGGINGFACE_LAYERS).partition(".")
    layer, num_layers = int(number), config["num_hidden_layers"]
    checkpoint_name, rows = _name_and_rows(name_in_layer, shape, layer, config, layout.expert_norm)
    is_stacked, prefix = layout.is_stacked and layer < num_layers, f"{_MEGATRON_LAYERS}{layer}."
    if is_stacked:
        prefix = _MEGATRON_LAYERS
    elif layer >= num_layers:
        # The decoder layer of multi-token prediction is a module inside the layer.
        prefix = f"{_MTP_LAYERS}{layer - num_layers}."
        prefix += "" if name_in_layer in _MTP_TENSORS else "transformer_layer."
    checkpoint_shape = (rows.num_groups * rows.in_group, *shape[1:])
    for group in range(rows.num_groups):
        start = group * rows.in_group + rows.first
        source = Block.rows(prefix + checkpoint_name, checkpoint_shape, start, start + rows.count)
        target = Block.rows(name, shape, group * rows.count, (group + 1) * rows.count)
        if is_stacked:
            stacked = Block(source.tensor, (layer, *source.offsets), (1, *source.sizes))
            yield (num_layers, *checkpoint_shape), Copy(stacked, target)
        else:
            yield checkpoint_shape, Copy(source, target)


@dataclass(frozen=True)
class _Rows:
    """The rows of a checkpoint's tensor that hold a transformers tensor.

    Attributes:
        num_groups: Number of groups of rows.
        in_group: Number of rows in a group.
        first: The first row of the tensor in each group.
        count: Number of rows of the tensor in each group.
    """

    num_groups: int
    in_group: int
    first: int
    count: int

    @classmethod
    def of_part(cls, sizes: Sequence[int], index: int, num_groups: int = 1) -> "_Rows":
        """Return the rows of the part `index` in groups whose parts have `sizes` rows."""
        return cls(num_groups, sum(sizes), sum(sizes[:index]), sizes[index])


def _name_and_rows(
    name: str, shape: tuple[int, ...], layer: int, config: Mapping[str, Any], expert_norm: str
) -> tuple[str, _Rows]:
    """Return the name under which a checkpoint holds a layer's tensor, and the tensor's rows under this name.

    Args:
        name: Name of the tensor inside the layer, in transformers' format.
        shape: Shape of the tensor.
        layer: Number of the layer; layers of multi-token prediction follow the decoder's.
        config: The fields of `MaskMoEConfig`.
        expert_norm: See `MegatronLayout`.
    """
    is_latent, whole = config["kv_lora_rank"] is not None, _Rows.of_part([shape[0]], 0)
    if name == _MLP_NORM:
        layer_types = config["mlp_layer_types"]
        if layer_types[min(layer, len(layer_types) - 1)] == "dense":
            return EXPERT_NORMS[0], whole
        return EXPERT_NORMS[1] if is_latent else expert_norm, whole
    if is_latent and name in _LATENT_ATTENTION_TENSORS:
        return _LATENT_ATTENTION_TENSORS[name], whole
    if name in _QKV:
        # A group has some query heads, then their key head, then their value head.
        fused, index = _QKV[name]
        num_groups, head_dim = config["num_key_value_heads"], config["head_dim"]
        query_rows = config["num_attention_heads"] // num_groups * head_dim
        return fused, _Rows.of_part([query_rows, head_dim, head_dim], index, num_groups)
    if name in _GATED:
        fused, index = _GATED[name]
        return fused, _Rows.of_part([shape[0], shape[0]], index)
    return _LAYER_TENSORS.get(name) or _MTP_TENSORS[name], whole


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


def name_in_hybrid_model(name: str) -> str:
    """Return the name that a hybrid model's checkpoint gives to a tensor or an object of the model's GPT twin.

    Args:
        name: A name in a GPT model's checkpoint that has tensors for each layer.
    """
    if name.startswith(_FINAL_NORM):
        return f"decoder.final_norm.{name.removeprefix(_FINAL_NORM)}"
    if match := _DECODER_LAYER.match(name):
        module = name[match.end() :]
        return f"decoder.layers.{2 * int(match[1]) + _is_feed_forward(module)}.{module}"
    if match := _PREDICTION_LAYER.match(name):
        module = name[match.end() :]
        return f"{match[1]}mtp_model_layer.layers.{int(_is_feed_forward(module))}.{module}"
    return name


def _is_feed_forward(module: str) -> bool:
    """Return whether a module of a transformer layer belongs to the second symbol of the layer, `-` or `E`."""
    return module.startswith(_FEED_FORWARD_MODULES)
