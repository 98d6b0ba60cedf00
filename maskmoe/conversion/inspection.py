"""Reports what a checkpoint or a model holds, in either format, and whether its files are intact."""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskmoe.checkpoint.integrity import Damage, Manifest, check_content, check_structure
from maskmoe.conversion.blocks import TensorSpec
from maskmoe.conversion.megatron_models import find_megatron_checkpoint, is_optimizer
from maskmoe.conversion.model_tensors import ROUTING_MASK_PREFIX, read_mask
from maskmoe.conversion.opened_model import CONFIG_FILE
from maskmoe.conversion.safetensors_files import SafetensorsSource
from maskmoe.conversion.torch_dist import TorchDistSource
from maskmoe.conversion.writing import JOURNAL
from maskmoe.errors import UserError
from maskmoe.json_files import read_json
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import CHECKPOINT_PREFIX

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
}
_LAYOUT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "expert_model_parallel_size": "EP",
    "context_parallel_size": "CP",
    "data_parallel_size": "DP",
}


@dataclass(frozen=True)
class MaskSummary:
    """Sizes, digest and provenance of a routing mask.

    Attributes:
        digest: digest of the mask's content and provenance.
        vocab_size: number of ids.
        num_experts: number of experts.
        num_tables: 1 if all layers share a table, else the number of layers.
        several_visible: share of the ids that see several experts, 0 to 1.
        provenance: what the mask was made from.
    """

    digest: str
    vocab_size: int
    num_experts: int
    num_tables: int
    several_visible: float
    provenance: dict[str, Any]


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
        active_parameters: number of parameters that a token with k experts uses; None if k is unknown.
        bytes_by_dtype: bytes of the weights by dtype.
        optimizer_bytes: bytes of the optimizer's state.
        routing_mask: the routing mask; None if there is none.
        files: sizes in bytes by name.
        digests: sha256 digests by name, of the files whose digests were saved with them.
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
    routing_mask: MaskSummary | None
    files: dict[str, int]
    digests: dict[str, str]

    def table(self) -> str:
        """Return the report as lines of text."""
        total = sum(self.parameters.values())
        active = f" · {self.active_parameters:,} active" if self.active_parameters is not None else ""
        lines = [
            f"{self.path}",
            f"format         {self.format}, {len(self.files)} files, {_in_units(sum(self.files.values()))}",
            f"integrity      {self.integrity}",
        ]
        if self.iteration is not None:
            lines.append(f"iteration      {self.iteration}")
        if self.layout:
            lines.append("saved by       " + " · ".join(f"{name} {size}" for name, size in self.layout.items()))
        lines.append(f"parameters     {total:,}{active}")
        lines += [f"  {part:<15}{count:>20,}" for part, count in self.parameters.items()]
        weights = ", ".join(f"{_in_units(size)} {dtype}" for dtype, size in self.bytes_by_dtype.items())
        lines.append(f"weights        {weights}")
        if self.optimizer_bytes:
            lines.append(f"optimizer      {_in_units(self.optimizer_bytes)}")
        lines += _mask_lines(self.routing_mask) if self.routing_mask else ["routing mask   none"]
        lines += [
            f"{name:<40}{_in_units(size):>12}  {self.digests.get(name, '')[:16]}" for name, size in self.files.items()
        ]
        return "\n".join(lines)


def inspect_checkpoint(path: Path, verify: bool = True) -> Inspection:
    """Inspect a transformers model, a checkpoint, or the newest sound checkpoint of a run.

    Args:
        path: the folder of the model, the checkpoint or the run.
        verify: compare the files with the digests that were saved with them.

    Raises:
        UserError: the folder holds neither, or the tensors cannot be listed.
    """
    if (path / JOURNAL).exists():
        raise UserError(
            f"{path} is the unfinished output of a conversion; start the conversion again with the same settings"
        )
    if (path / CONFIG_FILE).exists():
        return _inspect_huggingface(path, verify)
    return _inspect_megatron(find_megatron_checkpoint(path), verify)


def _inspect_megatron(checkpoint: Path, verify: bool) -> Inspection:
    """Inspect a `torch_dist` checkpoint."""
    try:
        check_structure(checkpoint)
        integrity = _check_content(checkpoint, verify)
    except Damage as damage:
        integrity = str(damage)
    source = TorchDistSource(checkpoint)
    common = source.common_state()
    args = common.get("args", Namespace())
    weights = {name: spec for name, spec in source.tensors.items() if not is_optimizer(name)}
    optimizer_bytes = sum(spec.num_bytes for name, spec in source.tensors.items() if is_optimizer(name))
    layout = {short: getattr(args, name) for name, short in _LAYOUT.items() if hasattr(args, name)}
    experts = getattr(args, "moe_router_topk", None), getattr(args, "num_experts", None)
    return _summarise(
        checkpoint,
        format="torch_dist",
        integrity=integrity,
        iteration=common.get("iteration"),
        layout={"ranks": getattr(args, "world_size", None) or _num_ranks(checkpoint)} | layout,
        weights=weights,
        experts=experts,
        optimizer_bytes=optimizer_bytes,
        routing_mask=_summarise_mask(read_mask(source, CHECKPOINT_PREFIX)),
    )


def _inspect_huggingface(folder: Path, verify: bool) -> Inspection:
    """Inspect a transformers model of any family."""
    source = SafetensorsSource(folder)
    try:
        integrity = _check_content(folder, verify)
    except Damage as damage:
        integrity = str(damage)
    config = read_json(folder / CONFIG_FILE)
    num_experts = config.get("num_experts") or config.get("num_local_experts")
    return _summarise(
        folder,
        format=f"transformers ({config.get('model_type')})",
        integrity=integrity,
        iteration=None,
        layout={},
        weights=source.tensors,
        experts=(config.get("num_experts_per_tok"), num_experts),
        optimizer_bytes=0,
        routing_mask=_summarise_mask(read_mask(source, ROUTING_MASK_PREFIX)),
    )


def _summarise(
    folder: Path, *, weights: Mapping[str, TensorSpec], experts: tuple[int | None, int | None], **known: Any
) -> Inspection:
    """Count parameters and list files.

    Args:
        folder: the folder of the checkpoint or model.
        weights: the model's tensors by name.
        experts: k and N; None if unknown.
        known: the attributes of `Inspection` that need no counting.
    """
    weights = {name: spec for name, spec in weights.items() if "routing_mask." not in name}
    parameters: Counter[str] = Counter()
    bytes_by_dtype: Counter[str] = Counter()
    for name, spec in weights.items():
        part = next(part for part, pattern in _PARTS.items() if re.search(pattern, name))
        parameters[part] += spec.num_bytes // spec.dtype.itemsize
        bytes_by_dtype[str(spec.dtype).removeprefix("torch.")] += spec.num_bytes
    topk, num_experts = experts
    idle = parameters["experts"] * (num_experts - topk) // num_experts if num_experts and topk else 0
    manifest = _manifest(folder)
    return Inspection(
        path=str(folder),
        parameters={part: parameters[part] for part in _PARTS if parameters[part]},
        active_parameters=parameters.total() - idle if topk or not parameters["experts"] else None,
        bytes_by_dtype=dict(bytes_by_dtype),
        files={
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        },
        digests={name: record.sha256 for name, record in manifest.files.items()} if manifest else {},
        **known,
    )


def _check_content(folder: Path, verify: bool) -> str:
    """Compare the files with their digests if `verify` is set; return a sentence with the result.

    Raises:
        Damage: a file differs from its digest.
    """
    manifest = Manifest.load(folder)
    if manifest is None:
        return "complete; not verified, since it was saved without digests"
    if not verify:
        return "complete; not compared with its digests"
    check_content(folder)
    return "sound: all files have the content that was saved"


def _manifest(folder: Path) -> Manifest | None:
    """Return the record of a folder's files; None if it is missing or damaged."""
    try:
        return Manifest.load(folder)
    except Damage:
        return None


def _num_ranks(checkpoint: Path) -> int:
    """Return the number of ranks that wrote files of a checkpoint, from the files' names `__RANK_NUMBER.distcp`."""
    return len({path.name.split("_")[2] for path in checkpoint.glob("__*_*.distcp")})


def _summarise_mask(mask: RoutingMask | None) -> MaskSummary | None:
    if mask is None:
        return None
    return MaskSummary(
        digest=mask.digest,
        vocab_size=mask.vocab_size,
        num_experts=mask.num_experts,
        num_tables=len(mask.row_of_id),
        several_visible=float((mask.num_visible > 1).mean()),
        provenance=asdict(mask.provenance),
    )


def _mask_lines(mask: MaskSummary) -> list[str]:
    """Return the lines of the report about the routing mask."""
    made = mask.provenance
    recipe = {
        "assignment": made["preset"] or made["assignment"],
        "P": made["frequent_mass"],
        "V_f": made["frequent_visible_experts"],
        "seed": made["seed"],
        "counts": f"{made['counts_digest'][:16]}…" if made["counts_digest"] else None,
    }
    return [
        f"routing mask   {mask.digest}",
        f"  {mask.vocab_size:,} ids · {mask.num_experts} experts · {mask.num_tables} tables · "
        f"{mask.several_visible:.1%} of the ids see several experts",
        "  " + " · ".join(f"{name} {value}" for name, value in recipe.items() if value is not None),
    ]


def _in_units(size: int) -> str:
    """Return a size in bytes as text with a suitable unit."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
