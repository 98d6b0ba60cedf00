"""Reports what a checkpoint or a model holds, in either format, and whether its files are intact."""

import re
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from maskmoe.checkpoint.integrity import Damage, Manifest, check_content, check_structure
from maskmoe.checkpoint.series import locate_checkpoint
from maskmoe.conversion.huggingface_models import MTP_FILE
from maskmoe.conversion.megatron_models import is_optimizer
from maskmoe.conversion.model_config import read_model_config
from maskmoe.conversion.model_tensors import ROUTING_MASK_PREFIX, read_mask
from maskmoe.conversion.opened_model import CONFIG_FILE
from maskmoe.conversion.safetensors_files import SafetensorsSource, has_safetensors
from maskmoe.conversion.tensor_mapping import local_norm_name
from maskmoe.conversion.tensor_sources import JoinedSource, TensorSource
from maskmoe.conversion.torch_dist import TorchDistSource
from maskmoe.files.templates import render_template
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import CHECKPOINT_PREFIX

# Layers of multi-token prediction form a part of their own, since transformers does not compute them.
_MTP = "multi-token prediction"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# A tensor belongs to the first part whose pattern occurs in its name. The patterns cover Megatron's names and the names
# of all families of transformers.
_PARTS = {
    "norms": r"layer_?norm|\.norm\.|_norm\.",
    "shared experts": r"shared_expert",
    "experts": r"\.experts\.",
    "routers": r"\.(router|gate)\.",
    "attention": r"attention|self_attn",
    "dense MLPs": r"\.mlp\.",
    "embedding": r"embed",
    "output layer": r"output_layer|lm_head",
    "other": r"",
    _MTP: r"",
}
# Names of the number of experts in the configurations of all families.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Megatron's arguments have the suffix `_parallel_size`.
_LAYOUT = {"TP": "tensor_model", "PP": "pipeline_model", "EP": "expert_model", "CP": "context", "DP": "data"}


@dataclass(frozen=True)
class Inspection:
    """Report on the content of a checkpoint or a model.

    Attributes:
        path: the folder.
        format: "torch_dist" or "transformers (MODEL_TYPE)".
        integrity: a sentence that says whether the files are sound, or what is wrong with them.
        iteration: the iteration at which the checkpoint was saved; None for a transformers model.
        layout: sizes of the layout of ranks that saved the checkpoint ("ranks", "TP", "PP", ...); empty if unknown.
        parameters: number of parameters by part of the model.
        active_parameters: number of parameters that a token with k experts uses, without multi-token prediction; None
            if k is unknown.
        bytes_by_dtype: bytes of the weights by dtype.
        optimizer_bytes: bytes of the optimizer's state.
        routing_mask: digest, sizes and provenance of the routing mask, see `_describe_mask`; None if there is none.
    """

    path: str
    format: str
    integrity: str
    iteration: int | None
    layout: dict[str, int]
    parameters: dict[str, int]
    active_parameters: int | None
    bytes_by_dtype: dict[str, int]
    optimizer_bytes: int
    routing_mask: dict[str, Any] | None

    def table(self) -> str:
        """Return the report as lines of text."""
        text = render_template("maskmoe.conversion", "inspection.txt.j2", vars(self), {"in_units": _in_units})
        return text.rstrip("\n")


def inspect_checkpoint(path: Path, verify: bool = True) -> Inspection:
    """Inspect a transformers model, a checkpoint, or the newest sound checkpoint of a run.

    Args:
        path: the folder of the model, the checkpoint or the run.
        verify: compare the files with the digests that were saved with them.

    Raises:
        UserError: the folder holds neither, or the tensors cannot be listed.
    """
    if (path / CONFIG_FILE).exists():
        config = read_model_config(path / CONFIG_FILE)
        model: TensorSource = SafetensorsSource(path)
        if has_safetensors(path, MTP_FILE):
            model = JoinedSource(model, SafetensorsSource(path, MTP_FILE))
        num_experts = next((config[name] for name in _NUM_EXPERTS if config.get(name)), None)
        return _inspect(
            path,
            model,
            verify,
            num_layers=config.get("num_hidden_layers"),
            experts=(config.get("num_experts_per_tok"), num_experts),
            format=f"transformers ({config.get('model_type')})",
            iteration=None,
            layout={},
        )
    checkpoint = locate_checkpoint(path)
    source = TorchDistSource(checkpoint)
    common = source.common_state()
    args = vars(common.get("args", Namespace()))
    sizes = {short: args.get(f"{name}_parallel_size") for short, name in _LAYOUT.items()}
    # The names of files are `__RANK_NUMBER.distcp`.
    num_ranks = args.get("world_size") or len({file.name.split("_")[2] for file in checkpoint.glob("__*_*.distcp")})
    return _inspect(
        checkpoint,
        source,
        verify,
        num_layers=None,
        experts=(args.get("moe_router_topk"), args.get("num_experts")),
        format="torch_dist",
        iteration=common.get("iteration"),
        layout={"ranks": num_ranks} | {name: size for name, size in sizes.items() if size is not None},
    )


def _inspect(
    folder: Path,
    source: TensorSource,
    verify: bool,
    num_layers: int | None,
    experts: tuple[int | None, int | None],
    **known: Any,
) -> Inspection:
    """Verify files, count parameters and read the routing mask.

    Args:
        folder: the folder of the checkpoint or model.
        source: the tensors of the checkpoint or model.
        verify: compare the files with their digests.
        num_layers: number of layers of a transformers model; None if it is unknown or the folder is a checkpoint.
        experts: k and N; None if they are unknown.
        known: the attributes of `Inspection` that differ between the formats.
    """
    is_megatron = isinstance(source, TorchDistSource)
    mask_prefix = CHECKPOINT_PREFIX if is_megatron else ROUTING_MASK_PREFIX
    mask = read_mask(source, mask_prefix)
    parameters: Counter[str] = Counter()
    bytes_by_dtype: Counter[str] = Counter()
    optimizer_bytes = 0
    for name, spec in source.tensors.items():
        if is_optimizer(name):
            optimizer_bytes += spec.num_bytes
        elif not name.startswith(mask_prefix) and not _is_second_norm(name, source):
            part = _part_of(name, num_layers)
            parameters[part] += prod(spec.shape)
            bytes_by_dtype[str(spec.dtype).removeprefix("torch.")] += spec.num_bytes
    topk, num_experts = experts
    idle = parameters["experts"] * (num_experts - topk) // num_experts if num_experts and topk else 0
    return Inspection(
        path=str(folder),
        integrity=_check_integrity(folder, verify, is_megatron),
        parameters={part: parameters[part] for part in _PARTS if parameters[part]},
        active_parameters=parameters.total() - parameters[_MTP] - idle if topk or not parameters["experts"] else None,
        bytes_by_dtype=dict(bytes_by_dtype),
        optimizer_bytes=optimizer_bytes,
        routing_mask=_describe_mask(mask) if mask else None,
        **known,
    )


def _is_second_norm(name: str, source: TensorSource) -> bool:
    """Return whether a tensor repeats a norm of the same checkpoint, under the name of Transformer Engine's modules."""
    local_name = local_norm_name(name)
    return local_name != name and local_name in source.tensors


def _part_of(name: str, num_layers: int | None) -> str:
    """Return the part of the model, out of `_PARTS`, to which a tensor belongs; see `_inspect` for `num_layers`."""
    layer = _LAYER.match(name)
    if name.startswith("mtp.") or (layer and num_layers is not None and int(layer[1]) >= num_layers):
        return _MTP
    return next(part for part, pattern in _PARTS.items() if re.search(pattern, name))


def _check_integrity(folder: Path, verify: bool, is_megatron: bool) -> str:
    """Return a sentence that says whether the files of a folder are sound.

    Args:
        folder: the folder of the checkpoint or model.
        verify: compare the files with their digests.
        is_megatron: whether the folder is a `torch_dist` checkpoint.
    """
    try:
        if is_megatron:
            check_structure(folder)
        if not Manifest.load(folder).files:
            return "complete; not verified, since it was saved without digests"
        if not verify:
            return "complete; not compared with its digests"
        check_content(folder)
    except Damage as damage:
        return damage.fault
    return "sound: all files have the content that was saved"


def _describe_mask(mask: RoutingMask) -> dict[str, Any]:
    """Return the part of a report about the routing mask, as values that JSON can hold."""
    return {
        "digest": mask.digest,
        "vocab_size": mask.vocab_size,
        "num_experts": mask.num_experts,
        "num_tables": len(mask.row_of_id),  # 1 if all layers share a table
        # Share of the ids that see several experts, averaged over the tables.
        "several_visible": float((mask.row_of_id >= mask.num_experts).mean()),
        "provenance": asdict(mask.provenance),
    }


def _in_units(size: int) -> str:
    """Return a size in bytes as text with a suitable unit."""
    exponent = min(4, max(0, size.bit_length() - 1) // 10)
    return f"{size / 1024**exponent:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"
