"""Opens transformers models of other families (Llama, Mixtral, Qwen, ...) as MaskMoE models.

Each family is declared once in `FAMILIES`: how its settings translate to MaskMoE's, and how its files name the tensors.
Tensors that the settings do not account for, and settings that MaskMoE cannot express, are refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from maskmoe.conversion.model_files import SafetensorsSource
from maskmoe.conversion.model_tensors import (
    OpenedModel,
    Shapes,
    check_tensors,
    expert_projections,
    make_config,
    mtp_tensor_shapes,
    tensor_shapes,
    with_routing_mask,
)
from maskmoe.conversion.settings import CONFIG_FILE, read_model_config
from maskmoe.conversion.tensor_sources import Block, Copy, RearrangedSource, TensorSource
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.routing_mask.mask import RoutingMask

# Old files hold these tensors besides the parameters; models compute them from the configuration.
_COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_EXPERT_TENSOR = re.compile(r"\.experts\.(?:gate_up|down)_proj$")


@dataclass(frozen=True)
class Naming:
    """The names that files of another family give to MaskMoE's tensors.

    Attributes:
        projections: Names of the gate, up and down projections of one expert; None if the files stack all experts of a
            layer in one tensor, as MaskMoE does.
        experts: The part of a name between the layer's MLP and a projection of one expert.
        renamed: A part of MaskMoE's names, and the part of the file's names that replaces it.
    """

    projections: tuple[str, str, str] | None = None
    renamed: tuple[str, str] = (".mlp.", ".mlp.")
    experts: str = ".experts.{expert}."

    def copies(self, shapes: Shapes) -> Iterator[Copy]:
        """Yield the copies from the files' tensors that fill MaskMoE's tensors of these shapes."""
        for name, shape in shapes.items():
            file_name = name.replace(*self.renamed)
            if self.projections and (match := _EXPERT_TENSOR.search(file_name)):
                names = dict(zip(("gate", "up", "down"), self.projections, strict=True))
                for expert, projection, target in expert_projections(name, shape):
                    of_expert = self.experts.format(expert=expert)
                    source_name = f"{file_name[: match.start()]}{of_expert}{names[projection]}.weight"
                    yield Copy(Block.whole(source_name, target.sizes[1:]), target)
            else:
                yield Copy(Block.whole(file_name, shape), Block.whole(name, shape))


@dataclass(frozen=True)
class Family:
    """The models of one `model_type` of transformers.

    Attributes:
        namings: The namings that files of this family may follow: transformers saves under the names of its modules,
            or under the names of the family's first files.
        special_fields: Function from the family's configuration to the fields of `MaskMoEConfig` that have another
            name or no name in the family's configuration.
        refusals: Function from the family's configuration to settings that MaskMoE does not have, each with whether the
            model has it.
    """

    namings: tuple[Naming, ...] = (Naming(),)
    special_fields: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    refusals: Callable[[PreTrainedConfig], dict[str, bool]] = lambda config: {}


def _deepseek_v3_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the special fields of DeepSeek-V3; see `Family`."""
    is_grouped = config.topk_group < config.n_group  # all groups together do not restrict the choice
    return {
        "qk_norm": "latent",
        "num_experts": config.n_routed_experts,
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "n_group": config.n_group if is_grouped else None,
        "topk_group": config.topk_group if is_grouped else None,
        "shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
    }


def _deepseek_v3_refusals(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the refusals of DeepSeek-V3; see `Family`."""
    topk, topk_group, scale = config.num_experts_per_tok, config.topk_group, config.routed_scaling_factor
    return {
        "q_lora_rank null, since Megatron-Core then also normalises the input of the query projection": (
            config.q_lora_rank is None
        ),
        f"rms_norm_eps {config.rms_norm_eps}, since DeepSeek-V3 has 1e-6 in the norms of latent vectors": (
            config.rms_norm_eps != _LATENT_NORM_EPS
        ),
        "rope_interleave false": not config.rope_interleave,
        f"num_experts_per_tok {topk} with topk_group {topk_group}; two experts of a group must be chosen": (
            topk_group < config.n_group and topk != 2 * topk_group
        ),
        f"norm_topk_prob with num_experts_per_tok 1; the weight would be {scale}": config.norm_topk_prob and topk == 1,
    }


# transformers adds this to the mean square in the norms of latent vectors whatever is configured.
_LATENT_NORM_EPS = 1e-6
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The usual names of the projections of an MLP or of one expert."""

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(special_fields=lambda config: {"attention_bias": True}),
    "qwen3": Family(special_fields=lambda config: {"qk_norm": "head"}),
    "mixtral": Family(
        namings=(Naming(("w1", "w3", "w2"), (".mlp.", ".block_sparse_moe.")), Naming()),
        special_fields=lambda config: {"norm_topk_prob": True, "moe_intermediate_size": config.intermediate_size},
    ),
    "qwen2_moe": Family(
        namings=tuple(Naming(names, (".shared_experts.", ".shared_expert.")) for names in (PROJECTIONS, None)),
        special_fields=lambda config: {"attention_bias": config.qkv_bias, "shared_expert_gate": True},
    ),
    "qwen3_moe": Family((Naming(PROJECTIONS), Naming()), lambda config: {"qk_norm": "head"}),
    "olmoe": Family(
        namings=(Naming(PROJECTIONS), Naming()),
        special_fields=lambda config: {"qk_norm": "all_heads", "moe_intermediate_size": config.intermediate_size},
    ),
    "deepseek_v3": Family((Naming(PROJECTIONS), Naming()), _deepseek_v3_fields, _deepseek_v3_refusals),
}


def open_huggingface(folder: Path, mask: RoutingMask | None = None) -> OpenedModel:
    """Open a model of another family as a MaskMoE model.

    Args:
        folder: A folder as `save_pretrained` writes it, with `config.json` and safetensors files.
        mask: The routing mask for a model with experts. By default every id sees every expert, so that the MaskMoE
            model computes the same as the original.

    Raises:
        UserError: The files are missing or damaged, the family is unknown, MaskMoE cannot express a setting, the
            tensors do not match the configuration, or the mask does not fit.
    """
    config, files = read_config(folder / CONFIG_FILE), SafetensorsSource(folder)
    fields = translate_config(config, folder / CONFIG_FILE)
    # Files that transformers has saved lack the layers of multi-token prediction that the configuration mentions.
    if any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in files.tensors):
        fields["num_nextn_predict_layers"] = getattr(config, "num_nextn_predict_layers", 0)
    source = rename_tensors(files, fields, FAMILIES[config.model_type].namings, folder)
    if "sparse" not in fields["mlp_layer_types"]:
        if mask is not None:
            raise UserError(f"{folder} has no experts to route to; add experts with the subcommand upcycle")
        return OpenedModel(source, fields)
    return with_routing_mask(OpenedModel(source, fields), mask)


def read_config(path: Path) -> PreTrainedConfig:
    """Read the file with the configuration of a model of a known family.

    Raises:
        UserError: The configuration is missing or damaged, or the family is unknown.
    """
    values = read_model_config(path)
    model_type = str(values.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r} is not known; known are {', '.join(FAMILIES)}")
    return make_config(CONFIG_MAPPING[model_type], values, path)


def translate_config(config: PreTrainedConfig, path: Path) -> dict[str, Any]:
    """Return the fields of `MaskMoEConfig` that describe a model of another family, without a routing mask.

    Args:
        config: The configuration of the model.
        path: The file with the configuration, for error messages.

    Raises:
        UserError: MaskMoE cannot express some settings; names the settings.
    """
    # transformers takes over a maximum length outside of the rotary parameters when it makes the model.
    config.standardize_rope_params()
    read = _read_settings(config)
    if refusals := _inexpressible(config, read):
        raise UserError(f"{path}: MaskMoE cannot express {', '.join(refusals)}")
    # Fields of the same name mean the same in all families.
    own: dict[str, Any] = {"num_experts": 0, "num_nextn_predict_layers": 0}
    own |= {name: read[name] for name in MaskMoEConfig.__annotations__ if read.get(name) is not None}
    # The rotary embeddings of these families turn all features, whatever the factor.
    unread = ("type", "partial_rotary_factor")
    own["rope_parameters"] = {name: value for name, value in config.rope_parameters.items() if name not in unread}
    own |= FAMILIES[config.model_type].special_fields(config)
    step, dense = read.get("decoder_sparse_step", 1), read.get("mlp_only_layers") or ()
    first_sparse = read.get("first_k_dense_replace", 0)
    own["mlp_layer_types"] = [
        "sparse"
        if own["num_experts"] and (layer + 1) % step == 0 and layer >= first_sparse and layer not in dense
        else "dense"
        for layer in range(config.num_hidden_layers)
    ]
    return make_config(MaskMoEConfig, own, path).to_dict() | {"routing_mask": None, "output_router_logits": False}


def _read_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that a model of the family reads; a configuration keeps settings of other families, too."""
    # The modules of some families read a `head_dim` that their configuration does not declare.
    names = {field.name for field in fields(config)} | config.attribute_map.keys() | {"head_dim"}
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _inexpressible(config: PreTrainedConfig, read: Mapping[str, Any]) -> list[str]:
    """Return the settings that MaskMoE does not have, by their names in `config.json`.

    Args:
        config: The configuration of the model.
        read: See `_read_settings`.
    """
    settings = config.to_dict()
    window, length = settings.get("sliding_window"), config.max_position_embeddings
    # Other families have the window in all layers, whatever `layer_types` says.
    types = settings.get("layer_types") if config.model_type in ("qwen2", "qwen2_moe", "qwen3") else None
    is_windowed = "sliding_attention" in (types or ["sliding_attention"])
    clip, quantization = read.get("clip_qkv"), settings.get("quantization_config")
    rope_type, is_latent = config.rope_parameters["rope_type"], hasattr(config, "kv_lora_rank")
    rope_types = ("default", "yarn") if is_latent else ("default", "linear", "llama3")
    refusals = FAMILIES[config.model_type].refusals(config) | {
        f"sliding_window {window}; with max_position_embeddings {window} instead of {length} it would have no effect": (
            window and is_windowed and window < length
        ),
        f"hidden_act {config.hidden_act!r}, only 'silu'": config.hidden_act != "silu",
        f"rope_type {rope_type!r}, only {', '.join(rope_types)}": rope_type not in rope_types,
        "attention_bias: it includes a bias of the output projection": read.get("attention_bias"),
        "mlp_bias": read.get("mlp_bias"),
        f"clip_qkv {clip}": clip is not None,
        "is_causal false": settings.get("is_causal") is False,
        "quantization_config; convert the model before it was quantized": quantization is not None,
    }
    return [refusal for refusal, is_refused in refusals.items() if is_refused]


def rename_tensors(
    source: TensorSource, config: Mapping[str, Any], namings: Iterable[Naming], folder: Path
) -> RearrangedSource:
    """Present the tensors of a model's files as the tensors of a MaskMoE model without a routing mask.

    Args:
        source: Provides the tensors under the files' names.
        config: The fields of `MaskMoEConfig`.
        namings: The namings that the files may follow; the one that finds most tensors is used.
        folder: The model's folder, for error messages.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape; names the tensor.
    """
    shapes = tensor_shapes(config) | mtp_tensor_shapes(config)
    candidates = [{copy.source.tensor: copy for copy in naming.copies(shapes)} for naming in namings]
    copies = max(candidates, key=lambda candidate: len(candidate.keys() & source.tensors.keys()))
    expected = {name: copy.source.sizes for name, copy in copies.items()}
    computed = {name for name in source.tensors if _COMPUTED.search(name)}
    shared = copies_of_shared_tensors(source, config, folder)
    check_tensors(source.tensors, expected, str(folder), ignored=computed | shared)
    return RearrangedSource(source, shapes, copies.values())


def copies_of_shared_tensors(source: TensorSource, config: Mapping[str, Any], folder: Path) -> set[str]:
    """Return the names of the copies of the embedding and output layer that a model's files hold.

    An output layer that is tied to the embedding is a copy, and layers of multi-token prediction may hold copies.

    Raises:
        UserError: A copy differs from the model's own tensor.
    """
    is_tied, embedding = config["tie_word_embeddings"], "model.embed_tokens.weight"
    output = embedding if is_tied else "lm_head.weight"
    copies = {"lm_head.weight": embedding} if is_tied else {}
    for layer in range(config["num_hidden_layers"], config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{layer}.shared_head.head.weight"] = output
    found = {name: original for name, original in copies.items() if {name, original} <= source.tensors.keys()}
    for name, original in found.items():
        copy, own = (source.read(Block.whole(each, source.tensors[each].shape)) for each in (name, original))
        if copy.dtype != own.dtype or not torch.equal(copy, own):
            cure = "; set tie_word_embeddings to false in config.json" if name == "lm_head.weight" else ""
            raise UserError(f"{folder}: MaskMoE cannot express that {name} differs from {original}{cure}")
    return set(found)
