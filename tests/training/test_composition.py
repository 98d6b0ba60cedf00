"""What can be combined with a routing mask: the table of the README, row by row.

A row that works names runs whose losses equal those of one process, or tests. One that is refused names a command line
that `check_supported` refuses, with the reason that the table gives.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args

from maskmoe.errors import UserError
from maskmoe.training.arguments import add_maskmoe_arguments
from maskmoe.training.checks import check_supported

REPOSITORY = Path(__file__).parents[2]

# Sums are taken in another order, in fp32, whose numbers are 1.2e-7 apart. Up to 4.3e-7 was seen, not growing over the
# steps. A mask that differs in its seed alone differs by 2e-2.
FP32_ORDER_OF_SUMS = 2e-6

# Runs whose losses are compared with those of a run on one process; by that one, which they have their checkpoint from.
COMPARED = {
    "reference": [
        "expert parallel 2",
        "expert parallel 4",
        "expert parallel 2, distributed optimizer",
        "pipeline 2",
        "interleaved pipeline",
        "tensor 2 with sequence parallel",
        "data parallel 2, distributed optimizer",
        "tensor 2, expert parallel 2",
        "tensor 2, experts in 2 parts, data parallel 2",
        "all-gather, expert parallel 2",
        "all-gather, tensor 2, expert parallel 2",
        "full recompute",
        "selective recompute",
    ],
    "rich": [
        "rich, tensor 2, expert parallel 2",
        "rich, pipeline 2",
        "rich, interleaved pipeline",
        "rich, overlapped shared experts",
        "rich, tensor 2, expert parallel 2, pipeline 2",
        "rich, full recompute, tensor 2, pipeline 2",
        "rich, selective recompute",
    ],
    "repeated prediction": ["repeated prediction, tensor 2", "repeated prediction, pipeline 2"],
    "data parallel rich": ["data parallel rich, tensor 2, expert parallel 4, pipeline 2, data parallel 2"],
    "experts of one rank": [
        "experts of one rank, expert parallel 2",
        "experts of one rank, tensor 2, expert parallel 2",
        "experts of one rank, selective recompute",
        "experts of one rank, full recompute, expert parallel 2, pipeline 2",
        "experts of one rank, expert parallel 2, interleaved pipeline",
    ],
    "groups": ["groups, tensor 2, expert parallel 2", "groups, expert parallel 2"],
    "norms over all heads": ["norms over all heads, tensor 2"],
    "capacity": ["capacity, expert parallel 2", "capacity, pipeline 2"],
    "padded capacity": ["padded capacity, expert parallel 2", "padded capacity, pipeline 2"],
    "global loss": ["global loss, expert parallel 2", "global loss, tensor 2, data parallel 2"],
}
FAST = {
    "expert parallel 2",
    "pipeline 2",
    "interleaved pipeline",
    "tensor 2 with sequence parallel",
    "data parallel 2, distributed optimizer",
    "full recompute",
    "selective recompute",
    "rich, tensor 2, expert parallel 2",
    "rich, pipeline 2",
    "groups, tensor 2, expert parallel 2",
    "experts of one rank, selective recompute",
}
BF16 = "bf16, distributed optimizer"


@dataclass(frozen=True)
class Works:
    """A row of the table.

    Attributes:
        how: what the table says of it.
        flags: that all of its runs have.
        runs: names of compared runs.
        tests: `FILE::FUNCTION`, below `tests/`.
    """

    how: str
    flags: str = ""
    runs: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """A row of the table; with these flags training is refused."""

    flags: str


RICH = tuple(COMPARED["rich"])
JOINT_8 = "data parallel rich, tensor 2, expert parallel 4, pipeline 2, data parallel 2"
ROUTER = "transformer/test_router.py::"
EQUALS_STOCK = f"{ROUTER}test_all_visible_equals_stock_in_every_setting"
FOLLOWS = f"{ROUTER}test_follows_the_method"

TABLE: dict[str, Works | Refused] = {
    "tensor parallel with sequence parallel": Works(
        "2 ranks", "--tensor-model-parallel-size 2", ("tensor 2 with sequence parallel", RICH[0])
    ),
    "tensor parallel alone, in training": Refused("--tensor-model-parallel-size 2"),
    "pipeline parallel": Works(
        "2 ranks, 4 micro-batches a step", "--pipeline-model-parallel-size 2", ("pipeline 2", RICH[1])
    ),
    "interleaved pipeline": Works(
        "2 ranks, 4 chunks", "--num-layers-per-virtual-pipeline-stage 1", ("interleaved pipeline", RICH[2])
    ),
    "expert parallel": Works(
        "2 and 4 ranks", "--expert-model-parallel-size", ("expert parallel 2", "expert parallel 4")
    ),
    "expert tensor parallel": Works(
        "`--expert-tensor-parallel-size` 1 and 2 on 2 and 4 ranks",
        "--expert-tensor-parallel-size",
        ("tensor 2, expert parallel 2", "tensor 2, experts in 2 parts, data parallel 2"),
    ),
    "context parallel": Refused("--context-parallel-size 2"),
    "data parallel, gradient accumulation": Works("2 ranks, 2 or 4 micro-batches a step", runs=("expert parallel 2",)),
    "distributed optimizer, overlapped gradients and parameters": Works(
        "2 ranks",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ("data parallel 2, distributed optimizer",),
    ),
    "tensor 2 × expert 2 × pipeline 2": Works(
        "4 ranks",
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2",
        (RICH[4],),
    ),
    "tensor 2 × pipeline 2 × data 2, expert 4": Works("8 ranks", "--expert-model-parallel-size 4", (JOINT_8,)),
    "full recomputation": Works(
        "bit-equal to none on one rank; on 4 ranks", "--recompute-granularity full", ("full recompute", RICH[5])
    ),
    "selective recomputation of `moe`, `shared_experts`, `mlp`, `core_attn`": Works(
        "that of `moe` bit-equal to none; 2 ranks", "--recompute-modules moe", ("selective recompute", RICH[6])
    ),
    "selective recomputation of norms and activations": Refused("--recompute-modules layernorm"),
    "bf16": Works("2 ranks, losses to 5e-4 of fp32's", "--bf16", (BF16,)),
    "tied and untied embeddings": Works("2 ranks", runs=("pipeline 2", RICH[0], RICH[1])),
    "multi-token prediction": Works("2 and 4 ranks", "--mtp-num-layers 1", RICH),
    "multi-token prediction by one repeated layer": Works(
        "2 ranks", "--mtp-use-repeated-layer", tuple(COMPARED["repeated prediction"])
    ),
    "multi-latent attention": Refused("--multi-latent-attention"),
    "grouped-query attention": Works("2 and 4 ranks", "--group-query-attention", RICH),
    "norms of queries and keys over all heads": Works(
        "2 ranks", "--qk-layernorm-all-heads", tuple(COMPARED["norms over all heads"])
    ),
    "norms over all heads without norms": Refused("--qk-layernorm-all-heads"),
    "MoE layer frequency": Works("2 and 4 ranks", "--moe-layer-freq", RICH),
    "shared experts, with a gate": Works("2 and 4 ranks", "--moe-shared-expert-gate", RICH),
    "overlapped shared experts": Works("2 ranks", "--moe-shared-expert-overlap", (RICH[3],)),
    "latent experts": Refused("--moe-latent-size 16"),
    "load-balancing loss of micro-batches, of sequences, and lists of them": Works(
        "2, 4 and 8 ranks", "aux_loss seq_aux_loss", (*RICH, JOINT_8)
    ),
    "global load-balancing loss": Works(
        "2 and 4 ranks; data parallel, too, if a step has one micro-batch",
        "global_aux_loss",
        (*RICH, *COMPARED["global loss"]),
    ),
    "load-balancing losses over the routable tokens": Works("against plain torch", tests=(FOLLOWS,)),
    "z-loss": Works("2 and 4 ranks", "--moe-z-loss-coeff", RICH),
    "softmax before or after top-k, sigmoid": Works("against Megatron-Core's router", tests=(EQUALS_STOCK, FOLLOWS)),
    "square root of softplus": Works("2 ranks", "sqrtsoftplus", tuple(COMPARED["groups"])),
    "expert bias": Works("2 ranks", "--moe-router-enable-expert-bias", tuple(COMPARED["groups"])),
    "group-limited routing": Works(
        "2 ranks; only groups with a visible expert", "--moe-router-group-topk 2", tuple(COMPARED["groups"])
    ),
    "groups too few for k experts": Refused("--moe-router-num-groups 4 --moe-router-group-topk 1 --moe-router-topk 3"),
    "capacity factor, dropping by weight": Works(
        "2 ranks; of each rank's tokens, as Megatron-Core has it",
        "--moe-expert-capacity-factor",
        tuple(COMPARED["capacity"]),
    ),
    "capacity factor, dropping by position, padding to capacity": Works(
        "2 ranks; padding has weight 0",
        "--moe-pad-expert-input-to-capacity --moe-token-drop-policy position",
        tuple(COMPARED["padded capacity"]),
    ),
    "padding to capacity with an expert bias": Refused(
        "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity --moe-router-enable-expert-bias"
    ),
    "padding to more than all tokens": Refused("--moe-expert-capacity-factor 5 --moe-pad-expert-input-to-capacity"),
    "padding masks (`MaskMoEGPTModel`'s argument)": Works(
        "against Megatron-Core's router",
        tests=(
            f"{ROUTER}test_all_visible_equals_stock_with_padding",
            "transformer/test_gpt_model.py::test_padding_reaches_every_router",
        ),
    ),
    "dispatch planned from the token ids (rank-local masks)": Works(
        "2 and 4 ranks", "--expert-model-parallel-size 2", tuple(COMPARED["experts of one rank"])
    ),
    "all-gather dispatcher": Works(
        "2 ranks",
        "--moe-token-dispatcher-type allgather",
        ("all-gather, expert parallel 2", "all-gather, tensor 2, expert parallel 2"),
    ),
    "flex dispatcher": Refused("--moe-token-dispatcher-type flex"),
    "Sinkhorn balancing": Refused("--moe-router-load-balancing-type sinkhorn"),
    "quantile balancing": Refused("--moe-router-load-balancing-type quantile_balancing"),
    "fused router": Refused("--moe-router-fusion"),
    "router padding for fp8 and fp4": Refused("--moe-router-padding-for-quantization"),
    "replay of routing": Refused("--moe-enable-routing-replay"),
    "overlapped expert communication": Refused("--overlap-moe-expert-parallel-comm"),
    "MLP in chunks": Refused("--mlp-chunks-for-training 2"),
    "CUDA graphs": Refused("--cuda-graph-impl local"),
    "packed sequences": Refused("--sft"),
    "hybrid context parallel": Refused("--hybrid-context-parallel"),
    "Megatron's upcycling": Refused("--moe-use-upcycling"),
    "other layers' specs": Refused("--hybrid-layer-pattern M*ME"),
    "fully sharded data parallel": Refused("--use-torch-fsdp2"),
    "other checkpoint formats": Refused("--ckpt-format torch"),
}


def compared_runs() -> list:
    return [
        pytest.param(run, marks=[pytest.mark.runs(reference, run), *([] if run in FAST else [pytest.mark.slow])])
        for reference, runs in COMPARED.items()
        for run in runs
    ]


@pytest.mark.runs("reference")
def test_reference_learns(runs):
    (reference,) = runs
    losses = reference.curves["lm loss"]
    assert reference.iterations == list(range(1, 22))
    assert losses[21] < losses[1] - 0.4


@pytest.mark.parametrize("name", compared_runs())
def test_layout_agrees_with_single_process(runs, name):
    reference, run = runs
    assert run.iterations == list(range(run.iterations[0], reference.iterations[-1] + 1))
    assert len(run.iterations) >= 4
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.runs(model, f"{model}, resumed")) for model in ("rich", "groups")]
)
def test_resume_is_bit_equal(runs, model):
    """With all load-balancing losses, and with an expert bias."""
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference) == 0


@pytest.mark.runs("second rank without tokens, on 1", "second rank without tokens")
def test_rank_without_tokens_agrees_with_single_process(runs):
    reference, run = runs
    assert run.iterations == list(range(8, 13))
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("reference", "mask of another seed")
def test_another_mask_is_noticed(runs):
    reference, run = runs
    assert run.difference(reference) > 1e3 * FP32_ORDER_OF_SUMS
    assert run.difference(reference, ["lm loss"]) > 50 * FP32_ORDER_OF_SUMS


@pytest.mark.runs("reference", BF16)
def test_bf16_with_distributed_optimizer_agrees_roughly(runs):
    reference, run = runs
    assert run.difference(reference, ["lm loss", "lm loss validation"]) < 5e-4  # seen: 9e-5
    assert run.difference(reference) < 1e-2  # seen: 5e-3; neighbouring numbers are 8e-3 apart


@pytest.fixture
def reason(monkeypatch) -> Callable[[str], str]:
    """Why a command line is refused."""

    def reason(flags: str) -> str:
        command_line = ["pretrain", "--num-experts", "8", "--transformer-impl", "local", *flags.split()]
        monkeypatch.setattr(sys, "argv", command_line)
        with pytest.raises(UserError) as error:
            check_supported(parse_args(add_maskmoe_arguments))
        return str(error.value)

    return reason


def test_readme_has_the_table(reason):
    rows = ["| with a routing mask | | |", "|---|---|---|"]
    for name, row in TABLE.items():
        rows.append(
            f"| {name} | works | {row.how} |"
            if isinstance(row, Works)
            else f"| {name} | refused | {re.sub(r'(--[a-z0-9-]+)', r'`\1`', reason(row.flags))} |"
        )
    assert "\n".join(rows) in (REPOSITORY / "README.md").read_text(), "the README should have\n" + "\n".join(rows)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if isinstance(row, Works)])
def test_row_is_shown_by_runs_that_are_compared_or_by_tests(name, run_table, settings):
    row = TABLE[name]
    assert row.runs or row.tests
    assert set(row.runs) <= {*chain.from_iterable(COMPARED.values()), BF16}
    for run in row.runs:
        flags = " ".join(f"{settings} {run_table[run].flags}".split())
        assert all(flag in flags for flag in row.flags.split(" --")), run
    for test in row.tests:
        file, function = test.split("::")
        assert f"def {function}(" in (REPOSITORY / "tests" / file).read_text()


def test_compared_runs_are_of_one_model(run_table):
    for reference, runs in COMPARED.items():
        assert run_table[reference].ranks == 1
        for run in map(run_table.get, runs):
            assert run.mask == run_table[reference].mask and run.omits == run_table[reference].omits


@pytest.mark.parametrize("flags", [row.flags for row in TABLE.values() if isinstance(row, Refused)])
def test_reason_names_the_flag(reason, flags):
    assert any(flag in reason(flags) for flag in flags.split() if flag.startswith("--"))


@pytest.mark.runs("experts of one rank", "experts of one rank, selective recompute")
def test_dispatch_is_planned_where_it_can_be(runs):
    logs = ("\n".join(log.read_text() for log in run.folder.glob("*.log")) for run in runs)
    one_process, two_ranks = (re.search("dispatch of tokens to experts: (.*)", log)[1] for log in logs)
    assert one_process == "Megatron's dispatcher"
    assert two_ranks.startswith("one copy a rank, planned from the token ids")
