"""Opens transformers models of other families (Llama, Mixtral, Qwen, ...) as MaskMoE models.

Each family is declared once in `FAMILIES`: how its settings translate to MaskMoE's, and how its files name the tensors.
Tensors that the settings do not account for, and settings that MaskMoE cannot express, are refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from maskmoe.conversion.blocks import Block, Copy, RearrangedSource, TensorSource
from maskmoe.conversion.model_tensors import Shapes, check_tensors, tensor_shapes
from maskmoe.conversion.opened_model import CONFIG_FILE, OpenedModel, all_visible, with_routing_mask
from maskmoe.conversion.safetensors_files import SafetensorsSource
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask

# Old files hold these tensors besides the parameters; models compute them from the configuration.
_COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_EXPERT_TENSOR = re.compile(r"\.experts\.(gate_up|down)_proj$")


@dataclass(frozen=True)
class Naming:
    """The names that files of another family give to MaskMoE's tensors.

    Attributes:
        replacements: parts of MaskMoE's names, each with the part of the file's name that replaces it.
        projections: names of the gate, up and down projections of one expert; None if the files stack all experts of a
            layer in one tensor, as MaskMoE does.
    """

    replacements: Mapping[str, str] = field(default_factory=dict)
    projections: tuple[str, str, str] | None = None

    def copies(self, shapes: Shapes) -> Iterator[Copy]:
        """Yield the copies from the files' tensors that fill MaskMoE's tensors of these shapes."""
        for name, shape in shapes.items():
            if self.projections and (match := _EXPERT_TENSOR.search(name)):
                gate, up, down = self.projections
                yield from self._expert_copies(name, shape, [down] if match[1] == "down" else [gate, up])
            else:
                yield Copy(Block.whole(self._rename(name), shape), Block.whole(name, shape))

    def _expert_copies(self, name: str, shape: tuple[int, ...], projections: list[str]) -> Iterator[Copy]:
        """Yield the copies from the tensors of single experts to one stacked tensor.

        Args:
            name: name of the stacked tensor.
            shape: shape of the stacked tensor: experts, rows, columns.
            projections: names of the projections whose rows the stacked tensor holds one after the other.
        """
        num_experts, rows, columns = shape
        rows //= len(projections)
        layer = self._rename(name.rpartition(".")[0])
        for expert in range(num_experts):
            for part, projection in enumerate(projections):
                source = Block.whole(f"{layer}.{expert}.{projection}.weight", (rows, columns))
                yield Copy(source, Block(name, (expert, part * rows, 0), (1, rows, columns)))

    def _rename(self, name: str) -> str:
        for maskmoe_part, file_part in self.replacements.items():
            name = name.replace(maskmoe_part, file_part)
        return name


@dataclass(frozen=True)
class Family:
    """The models of one `model_type` of transformers.

    Attributes:
        namings: the namings that files of this family may follow: transformers saves under the names of its modules,
            or under the names of the family's first files.
        has_experts: whether the models are mixtures of experts.
        special_fields: function from the family's configuration to the fields of `MaskMoEConfig` that only this family
            sets.
        attributes: attributes that a configuration of this family must have, besides the sizes of all families.
    """

    namings: tuple[Naming, ...] = (Naming(),)
    has_experts: bool = False
    special_fields: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    attributes: tuple[str, ...] = ()


PLAIN_EXPERTS = {
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "use_expert_bias": False,
    "n_group": None,
    "topk_group": None,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": False,
    "aux_loss_tokens": "all",
}
"""Fields of `MaskMoEConfig` for a model with experts and without any of the optional features."""

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok")

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(special_fields=lambda config: {"attention_bias": True}),
    "qwen3": Family(special_fields=lambda config: {"qk_norm": "head"}),
    "mixtral": Family(
        namings=(Naming({".mlp.": ".block_sparse_moe."}, ("w1", "w3", "w2")), Naming()),
        has_experts=True,
        special_fields=lambda config: {"norm_topk_prob": True},
    ),
    "qwen2_moe": Family(
        namings=tuple(Naming({".shared_experts.": ".shared_expert."}, names) for names in (_PROJECTIONS, None)),
        has_experts=True,
        special_fields=lambda config: {
            "attention_bias": config.qkv_bias,
            "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "shared_expert_gate": True,
        },
        attributes=("moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Family(
        namings=(Naming(projections=_PROJECTIONS), Naming()),
        has_experts=True,
        special_fields=lambda config: {"qk_norm": "head"},
        attributes=("moe_intermediate_size",),
    ),
    "olmoe": Family(
        namings=(Naming(projections=_PROJECTIONS), Naming()),
        has_experts=True,
        special_fields=lambda config: {"qk_norm": "all_heads"},
    ),
}


def open_huggingface(folder: Path, mask: RoutingMask | None = None) -> OpenedModel:
    """Open a model of another family as a MaskMoE model.

    Args:
        folder: a folder as `save_pretrained` writes it, with `config.json` and safetensors files.
        mask: the routing mask for a model with experts. By default every id sees every expert, so that the MaskMoE
            model computes the same as the original.

    Raises:
        UserError: the files are missing or damaged, the family is unknown, MaskMoE cannot express a setting, the
            tensors do not match the configuration, or the mask does not fit.
    """
    config = read_config(folder)
    fields = translate_config(config, folder)
    source = rename_tensors(SafetensorsSource(folder), fields, FAMILIES[config.model_type].namings, folder)
    if "sparse" not in fields["mlp_layer_types"]:
        if mask is not None:
            raise UserError(f"{folder} has no experts to route to; add experts with the subcommand upcycle")
        return OpenedModel(source, fields)
    return with_routing_mask(OpenedModel(source, fields), mask or all_visible(fields))


def read_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of a model of a known family.

    Raises:
        UserError: the configuration is missing, damaged or incomplete, or the family is unknown.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
        model_type = str(values["model_type"])
    except OSError as error:
        raise UserError(f"{folder} is not a Hugging Face model: {CONFIG_FILE}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not describe a model: it must be a JSON object with a model_type") from error
    if model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    # transformers fills in missing sizes with those of some published model, so require the sizes, under any name.
    family, config_class = FAMILIES[model_type], CONFIG_MAPPING[model_type]
    synonyms = {attribute: synonym for synonym, attribute in config_class.attribute_map.items()}
    synonyms |= config_class.attribute_map
    required = (*_SIZES, *(_EXPERT_SIZES if family.has_experts else ()), *family.attributes)
    for name in required:
        if name not in values and synonyms.get(name) not in values:
            raise UserError(f"{path} lacks {name}")
    try:
        return config_class.from_dict(values)
    # The configuration classes of transformers raise any of these on values of wrong types.
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a configuration of {model_type}: {' '.join(str(error).split())}") from error


def translate_config(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Return the fields of `MaskMoEConfig` that describe a model of another family, without a routing mask.

    Args:
        config: the configuration of the model.
        folder: the model's folder, for error messages.

    Raises:
        UserError: MaskMoE cannot express a setting; names the setting.
    """
    for setting in _inexpressible(config):
        raise UserError(f"{folder / CONFIG_FILE}: MaskMoE cannot express {setting}")
    family = FAMILIES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {name: value for name, value in config.rope_parameters.items() if name != "type"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.hidden_act,
        "initializer_range": config.initializer_range,
        "attention_dropout": config.attention_dropout or 0.0,
        "attention_bias": False,
        "qk_norm": None,
        "num_experts": 0,
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in _sparse_layers(config)],
        "routing_mask": None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if family.has_experts:
        fields |= PLAIN_EXPERTS | {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
            "norm_topk_prob": getattr(config, "norm_topk_prob", None),
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
    return fields | family.special_fields(config)


def _sparse_layers(config: PreTrainedConfig) -> list[bool]:
    """Return for each layer whether it has experts."""
    if not FAMILIES[config.model_type].has_experts:
        return [False] * config.num_hidden_layers
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", ())
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers)]


def _inexpressible(config: PreTrainedConfig) -> Iterator[str]:
    """Yield the settings that MaskMoE does not have, by their names in `config.json`."""
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and windowed and window < config.max_position_embeddings:
        yield (
            f"sliding_window {window}; with max_position_embeddings {window} instead of "
            f"{config.max_position_embeddings} it would have no effect"
        )
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act!r}, only 'silu'"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ("default", "linear", "llama3"):
        yield f"rope_type {rope_type!r}, only default, linear and llama3"
    if getattr(config, "attention_bias", False):
        yield "attention_bias: it includes a bias of the output projection"
    if getattr(config, "mlp_bias", False):
        yield "mlp_bias"
    if getattr(config, "clip_qkv", None) is not None:
        yield f"clip_qkv {config.clip_qkv}"
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config; convert the model before it was quantized"


def rename_tensors(
    source: TensorSource, config: Mapping[str, Any], namings: Iterable[Naming], folder: Path
) -> RearrangedSource:
    """Present the tensors of a model's files as the tensors of a MaskMoE model without a routing mask.

    Args:
        source: provides the tensors under the files' names.
        config: the fields of `MaskMoEConfig`.
        namings: the namings that the files may follow; the one that finds most tensors is used.
        folder: the model's folder, for error messages.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; names the tensor.
    """
    shapes = tensor_shapes(config)
    candidates = [list(naming.copies(shapes)) for naming in namings]
    copies = max(candidates, key=lambda copies: len(_source_names(copies) & source.tensors.keys()))
    expected = {copy.source.tensor: copy.source.sizes for copy in copies}
    ignored = {name for name in source.tensors if _COMPUTED.search(name)}
    if config["tie_word_embeddings"]:
        ignored.add("lm_head.weight")
    check_tensors(source.tensors, expected, str(folder), ignored)
    return RearrangedSource(source, shapes, copies)


def _source_names(copies: Iterable[Copy]) -> set[str]:
    return {copy.source.tensor for copy in copies}
