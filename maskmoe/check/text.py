"""The report of `--check` as text for people."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from maskmoe.check.layout import Layout
from maskmoe.check.memory import StageMemory
from maskmoe.check.parameters import PARTS
from maskmoe.check.report import MemoryReport, ModelReport, Report

_GIB = 1 << 30
_PURPOSES = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "routing_mask": "routing mask",
    "activations": "activations in flight",
    "recomputation": "recomputed at one time",
    "logits": "logits and cross entropy",
    "dispatch": "rows being dispatched",
}


def report_lines(report: Report) -> Iterator[str]:
    """Yield the lines of a report, without its errors."""
    if report.layout is not None:
        yield from _layout_lines(report.layout)
    if report.model is not None:
        yield from _layer_lines(report.model)
        yield from _parameter_lines(report.model)
    if report.memory is not None:
        yield from _memory_lines(report.memory)
    yield from (f"note: {note}" for note in report.notes)
    if not report.errors:
        yield "no errors found"


def _layout_lines(layout: Layout) -> Iterator[str]:
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


def _layer_lines(model: ModelReport) -> Iterator[str]:
    whole, stages = model.whole, model.parameters.stages
    extra = f", {whole.mtp_layers} of multi-token prediction" if whole.mtp_layers else ""
    yield f"layers        {whole.layers}: {whole.moe_layers} with experts, {whole.dense_layers} without{extra}"
    if len(stages) > 1 or len(stages[0]) > 1:
        layers_of_stages = ["+".join(str(chunk.layers) for chunk in chunks) for chunks in stages]
        yield f"  of stages   {_run_lengths(layers_of_stages)}"


def _parameter_lines(model: ModelReport) -> Iterator[str]:
    whole, use = model.whole, model.expert_use
    yield f"parameters    {_parameters(whole.num_parameters)}"
    for part in PARTS:
        if whole.parameters[part]:
            yield f"  {part:<32}{whole.parameters[part]:>20,}"
    if not model.num_experts:
        return
    active = _parameters(model.active_parameters(use.most))
    without = ", without multi-token prediction" if whole.mtp_layers else ""
    yield f"active        {active}  for a token with {use.most} experts{without}"
    if model.has_mask:
        active = _parameters(model.active_parameters(use.mean))
        yield f"              {active}  on average, with {use.mean:.3g} experts a token: {use.description}"


def _memory_lines(memory: MemoryReport) -> Iterator[str]:
    """Yield the memory of the stage that needs most, by purpose, and the totals of all stages."""
    largest, num_stages = memory.largest_stage, len(memory.stages)
    stage = memory.stages[largest]
    where = f"pipeline stage {largest} of 0 to {num_stages - 1}, " if num_stages > 1 else ""
    yield f"memory        GiB a rank, {where}{stage.micro_batches_in_flight:.3g} micro-batches in flight"
    for name, purpose in _PURPOSES.items():
        kind = "exact" if name in StageMemory.EXACT else "estimate"
        if value := getattr(stage, name):
            yield f"  {purpose:<26}{value / _GIB:>9.2f}  {kind}"
    yield f"  {'total':<26}{stage.total / _GIB:>9.2f}"
    if num_stages > 1:
        yield f"  total of stages           {_run_lengths([f'{stage.total / _GIB:.2f}' for stage in memory.stages])}"
    if stage.doubled_rows:
        yield (
            f"  The estimate assumes equally many rows for all experts, {memory.rows_per_token:.3g} for each token; "
            f"a rank that gets twice as many rows needs {stage.doubled_rows / _GIB:.2f} GiB more."
        )
    yield "  Not included: the CUDA context, buffers of NCCL and cuBLAS, and fragmentation; leave a few GiB free."
    yield from (f"  Note: {clause}." for clause in memory.not_modelled)


def _parameters(number: int) -> str:
    """Write a number of parameters twice: rounded, and in full."""
    rounded = f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"
    return f"{rounded}  {number:,}"


def _run_lengths(values: Sequence[str]) -> str:
    """Write a list in which repeated neighbours are counted, such as `3, 14 × 4, 2`."""
    runs = [(value, len(list(same))) for value, same in groupby(values)]
    return ", ".join(value if number == 1 else f"{number} × {value}" for value, number in runs)
