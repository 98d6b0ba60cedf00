"""The result of `--check`, with the operations of a run, its form as JSON, and its form as text for people."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from maskmoe.files.templates import render_template
from maskmoe.megatron_compat.training_patches import count_operations
from maskmoe.training.preflight.layout import Layout
from maskmoe.training.preflight.memory import ESTIMATED, EXACT, MemoryReport
from maskmoe.training.preflight.parameters import Chunk, ModelParameters
from maskmoe.training.settings.samples import requested_training_samples

KINDS = {
    Symbols.ATTENTION: "attention",
    Symbols.MLA: "multi-latent attention",
    Symbols.GDN: "gated delta net",
    Symbols.MAMBA: "Mamba",
    Symbols.MLP: "MLP",
    Symbols.MOE: "MoE",
}
"""The kind of layer that each symbol of a pattern stands for."""


def compute_cost(args: Namespace, mean_experts: float) -> dict[str, float]:
    """Count the floating-point operations of a training run, see `cost` in `Report.to_json`.

    Args:
        args: Arguments that Megatron has validated.
        mean_experts: The mean number of experts that tokens use.
    """
    flops_per_token = count_operations(mean_experts, args, batch_size=1) / args.seq_length
    tokens = requested_training_samples(args) * args.seq_length
    return {"flops_per_token": flops_per_token, "tokens": tokens, "flops": flops_per_token * tokens}


@dataclass(frozen=True)
class Report:
    """Everything that `--check` finds out about a run.

    Attributes:
        errors: The errors that the run would end with, one line each.
        notes: Facts that the user should know but that do not stop the run, one line each.
        layout: How the run is divided; None if its sizes do not divide each other.
        model: The parameters of the model; None if the model cannot be built.
        memory: The memory of the run; None if the layout or the model is unknown.
        cost: The operations of the run; None if the layout or the model is unknown.
    """

    errors: tuple[str, ...]
    notes: tuple[str, ...] = ()
    layout: Layout | None = None
    model: ModelParameters | None = None
    memory: MemoryReport | None = None
    cost: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; these keys are stable.

        - `can_start`: whether the run could start. The exit code is 0 if it could, else 2.
        - `errors`, `notes`: lists of lines. The run could start if there is no error.
        - `layout`: null if the sizes do not divide each other. Else `ranks`; the parallel sizes `tensor`, `pipeline`,
          `context`, `data`, `expert`, `expert_tensor`, `expert_data` and `virtual_pipeline`; `micro_batch_group`;
          `micro_batch` and `global_batch` in samples; `micro_batches` of a rank in a step; `seq_length` and
          `tokens_per_step` in tokens.
        - `layers`: null if the model cannot be built. Else the number of predicted tokens in
          `multi_token_prediction`; in `kinds`, the numbers of all kinds of the decoder's layers; and `stages`: for each
          pipeline stage, the number of layers of each model chunk. A layer of a hybrid model is one symbol of its
          pattern.
        - `parameters`: null if the model cannot be built. Else `total`; `parts`, the number of each part of the model;
          `routed_experts`, experts of multi-token prediction included; `active` of a token with `experts_per_token`
          experts, and the means `mean_active` and `mean_experts_per_token` over the counted tokens;
          `padded_vocab_size`.
        - `memory`: null if the layout or the model is unknown. Else, in bytes of one rank, `stages`: for each pipeline
          stage the bytes of each purpose, `total` and `micro_batches_in_flight`; `largest_stage`, an index of `stages`;
          `exact`, the purposes whose bytes are not estimated.
        - `cost`: null if the layout or the model is unknown. Else `flops_per_token`, the floating-point operations of
          the forward and backward pass without recomputation; the run's `tokens`, those before a checkpoint included;
          and `flops`, all operations of the run.
        """
        layers = parameters = layout = memory = None
        if self.layout:
            derived = ("data", "expert_data", "micro_batches", "tokens_per_step")
            layout = asdict(self.layout) | {name: getattr(self.layout, name) for name in derived}
        if self.model:
            whole = self.model.whole
            layers = {
                "multi_token_prediction": len(whole.predictions),
                "kinds": _count_kinds(whole.layers),
                "stages": [[len(chunk.layers) for chunk in chunks] for chunks in self.model.stages],
            }
            parameters = {
                "total": whole.num_parameters,
                "parts": dict(whole.parameters),
                "routed_experts": whole.expert_parameters,
                "active": self.model.active(self.model.topk),
                "experts_per_token": self.model.topk,
                "mean_active": self.model.active(self.model.mean_experts),
                "mean_experts_per_token": self.model.mean_experts,
                "padded_vocab_size": self.model.padded_vocab_size,
            }
        if self.memory:
            stages = [asdict(stage) | {"total": stage.total} for stage in self.memory.stages]
            memory = {"stages": stages, "largest_stage": self.memory.largest_stage, "exact": list(EXACT)}
        findings = {"can_start": not self.errors, "errors": list(self.errors), "notes": list(self.notes)}
        run = {"layout": layout, "layers": layers, "parameters": parameters, "memory": memory, "cost": self.cost}
        return findings | run

    def to_text(self) -> str:
        """Return the report for people, without its errors; `templates/report.txt.j2` is its layout."""
        values = vars(self) | {"exact": EXACT, "purposes": EXACT | ESTIMATED}
        filters = {"gib": lambda size: f"{size / 2**30:.2f}", "run_lengths": _run_lengths, "kinds": _describe_layers}
        return render_template("maskmoe.training.preflight", "report.txt.j2", values, filters).rstrip("\n")


def _count_kinds(layers: Iterable[str]) -> dict[str, int]:
    """Return the number of layers of each kind; `layers` are the symbols of each layer."""
    symbols = "".join(layers)
    return {kind: symbols.count(symbol) for symbol, kind in KINDS.items()}


def _describe_layers(chunk: Chunk) -> str:
    """Describe the layers of a model by their kinds."""
    decoder, prediction = (
        ", ".join(f"{number} {kind}" for kind, number in _count_kinds(layers).items() if number)
        for layers in (chunk.layers, chunk.predictions)
    )
    return f"{chunk.num_layers}: {decoder}{f'; multi-token prediction: {prediction}' if prediction else ''}"


def _run_lengths(values: Iterable[str]) -> str:
    """Write a list in which repeated neighbours are counted, such as `3, 14 × 4, 2`."""
    runs = [(value, len(list(same))) for value, same in groupby(values)]
    return ", ".join(value if number == 1 else f"{number} × {value}" for value, number in runs)
