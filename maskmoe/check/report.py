"""The result of `--check`, and its form as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from maskmoe.check.expert_use import ExpertUse
from maskmoe.check.layout import Layout
from maskmoe.check.memory import StageMemory
from maskmoe.check.parameters import Chunk, ModelParameters


@dataclass(frozen=True)
class ModelReport:
    """The parameters of the model of a run.

    Attributes:
        parameters: the whole model, and each of its pipeline stages.
        num_experts: number of routed experts in a layer; None for a model without experts.
        expert_use: how many experts tokens use; 0 for a model without experts.
        has_mask: whether `expert_use` is computed from a routing mask.
        padded_vocab_size: number of rows of the embedding.
    """

    parameters: ModelParameters
    num_experts: int | None
    expert_use: ExpertUse
    has_mask: bool
    padded_vocab_size: int

    @property
    def whole(self) -> Chunk:
        """Return the model as one rank without parallelism holds it."""
        return self.parameters.whole

    def active_parameters(self, experts_per_token: float) -> int:
        """Return how many parameters a token passes through, multi-token prediction left out."""
        return round(self.whole.active_parameters(self.num_experts or 1, experts_per_token))


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a run.

    Attributes:
        stages: one rank of each pipeline stage.
        rows_per_token: mean number of rows that a token has on experts.
        not_modelled: a clause for each setting of the run that changes the memory but is not taken into account.
    """

    stages: tuple[StageMemory, ...]
    rows_per_token: float
    not_modelled: tuple[str, ...]

    @property
    def largest_stage(self) -> int:
        """Return the number of the pipeline stage that needs most memory, from 0."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)


@dataclass(frozen=True)
class Report:
    """Everything that `--check` finds out about a run.

    Attributes:
        errors: the errors that the run would end with, one line each.
        notes: facts that the user should know but that do not stop the run, one line each.
        layout: how the run is divided; None if its sizes do not divide each other.
        model: the parameters of the model; None if the model cannot be built.
        memory: the memory of the run; None if the layout or the model is unknown.
    """

    errors: tuple[str, ...]
    notes: tuple[str, ...] = ()
    layout: Layout | None = None
    model: ModelReport | None = None
    memory: MemoryReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; these keys are stable.

        - `errors`, `notes`: lists of lines. The exit code is 2 if there is an error, else 0.
        - `layout`: null if the sizes do not divide each other. Else `ranks`; the parallel sizes `tensor`, `pipeline`,
          `context`, `data`, `expert`, `expert_tensor`, `expert_data` and `virtual_pipeline`; `micro_batch_group`;
          `micro_batch` and `global_batch` in samples; `micro_batches` of a rank in a step; `seq_length` and
          `tokens_per_step` in tokens.
        - `layers`: null if the model cannot be built. Else the numbers of layers `with_experts`, `without_experts` and
          of `multi_token_prediction`, and `stages`: for each pipeline stage, the number of layers of each model chunk.
        - `parameters`: null if the model cannot be built. Else `total`; `parts`, the number of each part of the model;
          `routed_experts`, experts of multi-token prediction included; `active` of a token with `experts_per_token`
          experts, and the means `mean_active` and `mean_experts_per_token` over the counted tokens;
          `padded_vocab_size`.
        - `memory`: null if the layout or the model is unknown. Else, in bytes of one rank, `stages`: for each pipeline
          stage the bytes of each purpose, `total`, `doubled_rows` (additional bytes if the experts get twice their
          share of rows) and `micro_batches_in_flight`; `largest_stage`, an index of `stages`; `exact`, the purposes
          whose bytes are not estimated; `not_modelled`, a list of clauses.
        """
        return {
            "errors": list(self.errors),
            "notes": list(self.notes),
            "layout": self.layout and _layout_as_json(self.layout),
            "layers": self.model and _layers_as_json(self.model),
            "parameters": self.model and _parameters_as_json(self.model),
            "memory": self.memory and _memory_as_json(self.memory),
        }


def _layout_as_json(layout: Layout) -> dict[str, int]:
    return asdict(layout) | {
        "data": layout.data,
        "expert_data": layout.expert_data,
        "micro_batches": layout.num_micro_batches,
        "tokens_per_step": layout.tokens_per_step,
    }


def _layers_as_json(model: ModelReport) -> dict[str, Any]:
    return {
        "with_experts": model.whole.moe_layers,
        "without_experts": model.whole.dense_layers,
        "multi_token_prediction": model.whole.mtp_layers,
        "stages": [[chunk.layers for chunk in chunks] for chunks in model.parameters.stages],
    }


def _parameters_as_json(model: ModelReport) -> dict[str, Any]:
    use = model.expert_use
    return {
        "total": model.whole.num_parameters,
        "parts": dict(model.whole.parameters),
        "routed_experts": model.whole.expert_parameters,
        "active": model.active_parameters(use.most),
        "experts_per_token": use.most,
        "mean_active": model.active_parameters(use.mean),
        "mean_experts_per_token": use.mean,
        "padded_vocab_size": model.padded_vocab_size,
    }


def _memory_as_json(memory: MemoryReport) -> dict[str, Any]:
    return {
        "stages": [asdict(stage) | {"total": stage.total} for stage in memory.stages],
        "largest_stage": memory.largest_stage,
        "exact": list(StageMemory.EXACT),
        "not_modelled": list(memory.not_modelled),
    }
