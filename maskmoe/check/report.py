"""The text that `--check` prints."""

from collections.abc import Iterator, Sequence

import numpy as np

from maskmoe.check.activations import ActivationModel, micro_batches_in_flight
from maskmoe.check.layout import Layout
from maskmoe.check.memory import StageMemory
from maskmoe.check.parameters import PARTS, Chunk, ModelParameters
from maskmoe.routing_mask.mask import RoutingMask

_GIB = 1 << 30
_WHAT = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "routing_mask": "routing mask",
    "activations": "activations in flight",
    "recomputation": "recomputed at one time",
    "logits": "logits and cross entropy",
    "dispatch": "rows being dispatched",
}


def describe_layout(layout: Layout) -> Iterator[str]:
    """The arithmetic of ranks and batch; of a layout that divides."""
    yield f"ranks         {layout.ranks}"
    yield (
        f"  dense parts TP {layout.tensor} × PP {layout.pipeline} × CP {layout.context} × DP {layout.data} = "
        f"{layout.ranks}"
    )
    yield (
        f"  experts     ETP {layout.expert_tensor} × EP {layout.expert} × PP {layout.pipeline} × expert DP "
        f"{layout.expert_data} = {layout.ranks}"
    )
    yield (
        f"step          {layout.global_batch:,} samples = {layout.num_micro_batches:,} micro-batches × "
        f"{layout.micro_batch} × DP {layout.data}"
        + (f"; {layout.tokens_per_step:,} tokens" if layout.seq_length else "")
    )


def describe_layers(model: ModelParameters) -> Iterator[str]:
    """How many layers each pipeline stage has."""
    whole = model.whole
    extra = f", {whole.mtp_layers} of multi-token prediction" if whole.mtp_layers else ""
    yield f"layers        {whole.layers}: {whole.moe_layers} with experts, {whole.dense_layers} without{extra}"
    if len(model.stages) > 1 or len(model.stages[0]) > 1:
        yield f"  of stages   {_runs([_layers_of_stage(chunks) for chunks in model.stages])}"


def describe_parameters(
    model: ModelParameters, num_experts: int | None, topk: int, mask: RoutingMask | None
) -> Iterator[str]:
    """Parameters in all and of a token; exact."""
    whole = model.whole
    yield f"parameters    {_number(whole.num_parameters)}"
    for part in PARTS:
        if whole.parameters[part]:
            yield f"  {part:<32}{whole.parameters[part]:>20,}"
    if not num_experts:
        return
    active = _number(active_parameters(whole, num_experts, topk))
    without = ", without multi-token prediction" if whole.mtp_layers else ""
    yield f"active        {active}  for a token with {topk} experts{without}"
    if mask is not None:
        mean = experts_per_token(mask, topk)
        active = _number(active_parameters(whole, num_experts, mean))
        yield f"              {active}  on average, with {mean:.3g} experts a token: {_describe_use(mask, topk)}"


def describe_memory(
    layout: Layout, memory: Sequence[StageMemory], activations: ActivationModel, model: ModelParameters
) -> Iterator[str]:
    """The memory of the stage that needs most, by part, and of all."""
    totals = [stage.total for stage in memory]
    largest = int(np.argmax(totals))
    stage = memory[largest]
    where = f"pipeline stage {largest} of 0 to {layout.pipeline - 1}, " if layout.pipeline > 1 else ""
    yield f"memory        GiB a rank, {where}{micro_batches_in_flight(layout, largest):.3g} micro-batches in flight"
    for name, what in _WHAT.items():
        kind = "exact" if name in StageMemory.EXACT else "estimate"
        if value := getattr(stage, name):
            yield f"  {what:<26}{value / _GIB:>9.2f}  {kind}"
    yield f"  {'total':<26}{stage.total / _GIB:>9.2f}"
    if layout.pipeline > 1:
        yield f"  total of stages           {_runs([f'{total / _GIB:.2f}' for total in totals])}"
    doubled = activations.bytes_of_doubled_rows(layout, largest, model.stages[largest])
    if doubled:
        yield (
            f"  All experts are taken to get equally many rows, {activations.experts_per_token:.3g} for each token; "
            f"a rank that gets twice as many needs {doubled / _GIB:.2f} more."
        )
    yield "  Not in it: the CUDA context, buffers of NCCL and cuBLAS, and fragmentation; leave a few GiB."


def active_parameters(whole: Chunk, num_experts: int, experts: float) -> float:
    """Parameters that a token with so many experts passes through, multi-token prediction left out."""
    routed = whole.parameters["routed experts"]
    return whole.num_parameters - whole.parameters["multi-token prediction"] - routed * (1 - experts / num_experts)


def experts_per_token(mask: RoutingMask, topk: int) -> float:
    """Experts that a token of the counted datasets uses on average, `min(k, V)`.

    The frequent ids are taken to have exactly the share of occurrences that they were chosen to cover, which differs
    from their true share by less than one id's.
    """
    used = np.minimum(mask.num_visible, topk)
    is_frequent = mask.num_visible > 1
    if is_frequent.all() or not is_frequent.any():
        return float(used.mean())
    share = mask.provenance.frequent_mass
    return float(share * used[is_frequent].mean() + (1 - share) * used[~is_frequent].mean())


def _describe_use(mask: RoutingMask, topk: int) -> str:
    used = np.minimum(mask.num_visible, topk)
    is_frequent = mask.num_visible > 1
    if is_frequent.all() or not is_frequent.any():
        return f"every id uses {used.mean():.3g}"
    return f"{mask.provenance.frequent_mass:.0%} of the tokens use {used[is_frequent].mean():.3g}, the others 1"


def _layers_of_stage(chunks: Sequence[Chunk]) -> str:
    return "+".join(str(chunk.layers) for chunk in chunks)


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _number(parameters: float) -> str:
    return f"{_billions(parameters)}  {round(parameters):,}"


def _runs(values: Sequence[str]) -> str:
    """A list in which what repeats is counted: `3, 14 × 4, 2`."""
    runs: list[tuple[str, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return ", ".join(value if number == 1 else f"{number} × {value}" for value, number in runs)
