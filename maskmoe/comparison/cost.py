"""States what a suite costs in GPU-hours before any of its runs has started.

The operations of a model follow here from its flags alone, so that no model is built. `--check` of a run counts the
operations of every model; tests compare both.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from maskmoe.comparison.runs import Run, checkpoint_iterations, choose_learning_rates, tuning_runs, whole_runs
from maskmoe.comparison.suite import Suite, Variant
from maskmoe.launch.model_file import Flags
from maskmoe.training.preflight.assumed_gpu import AssumedGpu, format_gpu_hours

_PADDING = 128  # Megatron's default for --make-vocab-size-divisible-by
# Flags of models whose operations only `--check` knows.
_OTHER_MODELS = {
    *("hybrid-layer-pattern", "multi-latent-attention", "experimental-attention-variant", "mtp-num-layers"),
    *("moe-layer-freq", "moe-latent-size", "attention-output-gate", "moe-shared-expert-gate"),
    *("recompute-granularity", "make-vocab-size-divisible-by"),
}
_GROUPS = {
    "tuning": "learning rates",
    "main": "runs",
    "grid": "grid of P and V_f",
    "curve": "curves",
    "limit": "limits",
}


@dataclass(frozen=True)
class GroupCost:
    """The cost of all runs of one kind.

    Attributes:
        kind: the kind, for people.
        num_runs: number of runs.
        tokens: tokens of all runs together.
        flops: floating-point operations of all runs together.
    """

    kind: str
    num_runs: int
    tokens: int
    flops: float


def suite_cost(suite: Suite, vocab_size: int | None = None) -> tuple[GroupCost, ...] | None:
    """Return the cost of each kind of run, without evaluation.

    Args:
        suite: the suite.
        vocab_size: number of ids of the tokenizer, if it is not the suite's.

    Returns:
        The cost; None if a model is of another kind than is counted here, or if the size of the vocabulary is unknown.
    """
    vocab_size = vocab_size or _number(suite.data, "vocab-size")
    if vocab_size is None:
        return None
    of_variant = {
        name: flops_per_token(variant, int(variant.vocab_size or vocab_size))
        for name, variant in suite.variants.items()
    }
    if None in of_variant.values():
        return None
    runs = (*tuning_runs(suite), *whole_runs(suite, choose_learning_rates(suite, {})))
    groups = []
    for group, kind in _GROUPS.items():
        tokens = [(run, _tokens(suite, run)) for run in runs if _group(run) == group]
        if tokens:
            flops = sum(number * (of_variant[run.variant.name] or 0) for run, number in tokens)
            groups.append(GroupCost(kind, len(tokens), sum(number for _, number in tokens), flops))
    return tuple(groups)


def describe_cost(suite: Suite, gpu: AssumedGpu, vocab_size: int | None = None) -> Iterator[str]:
    """Yield a line for each kind of run and one for all runs; nothing for a suite of less than one GPU-hour.

    Args:
        suite: the suite.
        gpu: the GPU that is assumed.
        vocab_size: number of ids of the tokenizer, if it is not the suite's.
    """
    groups = suite_cost(suite, vocab_size)
    if groups is None:
        yield "cost      unknown: `launch/pretrain.sh --check` of a run's model file states it"
        return
    total = GroupCost(
        "all", *(sum(getattr(group, name) for group in groups) for name in ("num_runs", "tokens", "flops"))
    )
    if gpu.hours(total.flops) < 1:
        return
    for group in (*groups, total):
        amounts = f"{group.num_runs:3} runs  {group.tokens / 1e9:8,.1f} B tokens  {group.flops:.2e} FLOPs"
        yield f"cost      {group.kind:<18}{amounts}  {format_gpu_hours(gpu.hours(group.flops)):>7} GPU-hours"
    yield f"          training only, with {gpu}"


def flops_per_token(variant: Variant, vocab_size: int) -> float | None:
    """Return the operations of the forward and backward pass for one token.

    Args:
        variant: the variant. With a routing mask a token can use fewer than `moe-router-topk` experts; this is ignored.
        vocab_size: number of ids of the tokenizer.

    Returns:
        The operations; None if the flags describe a model that is not counted here.
    """
    flags = variant.flags
    if _OTHER_MODELS & flags.keys():
        return None
    hidden_size, heads = _number(flags, "hidden-size"), _number(flags, "num-attention-heads")
    if not (hidden_size and heads):
        return None
    # Parameters of the matrices that a token passes through in one layer.
    head_width = _number(flags, "kv-channels") or hidden_size // heads
    groups = _number(flags, "num-query-groups") if "group-query-attention" in flags else heads
    attention = hidden_size * head_width * (2 * heads + 2 * (groups or heads))
    matrices_of_mlp = 3 if "swiglu" in flags else 2
    widths = _number(flags, "ffn-hidden-size") or 4 * hidden_size
    router = 0
    if variant.has_experts:
        width = _number(flags, "moe-ffn-hidden-size") or widths
        widths = (_number(flags, "moe-router-topk") or 2) * width
        widths += _number(flags, "moe-shared-expert-intermediate-size") or 0
        router = hidden_size * (_number(flags, "num-experts") or 0)
    layer = attention + matrices_of_mlp * hidden_size * widths + router
    # Scores and weighted values of attention: a query sees half of the keys on average.
    scores = heads * head_width * (_number(flags, "seq-length") or 0)
    padded = -(-vocab_size // _PADDING) * _PADDING
    return 6 * ((_number(flags, "num-layers") or 0) * (layer + scores) + hidden_size * padded)


def _number(flags: Flags, name: str) -> int | None:
    """Return the value of a flag; None if the flag is missing."""
    return int(flags[name][0]) if name in flags else None


def _group(run: Run) -> str:
    return "tuning" if run.kind == "tuning" else run.variant.role


def _tokens(suite: Suite, run: Run) -> int:
    """Return the number of tokens that a run trains on."""
    samples = int(run.variant.flags["global-batch-size"][0])
    return checkpoint_iterations(suite, run)[-1] * samples * suite.seq_length
