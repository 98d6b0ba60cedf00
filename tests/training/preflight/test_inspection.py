"""Tests of `--check`: its counts against models that are built, its errors, its arithmetic, its text."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.training.arguments import parse_args
from support.launchers import RANK_SCRIPTS, run_script_as_ranks
from support.runs import free_port
from support.training import without_flags

from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.data.indexed_dataset import optimal_dtype
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.frequency import count_token_frequency
from maskmoe.routing_mask.mask import HashLayers
from maskmoe.training.preflight.command import requested_check
from maskmoe.training.preflight.cost import TrainingCost
from maskmoe.training.preflight.memory import MemoryReport, StageMemory
from maskmoe.training.preflight.parameters import PARTS, Chunk, ExpertUse, ModelParameters
from maskmoe.training.preflight.report import Report
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.layout import Layout, layout_errors
from maskmoe.training.settings.missing_inputs import MissingInput, missing_dataset

SCRIPT = RANK_SCRIPTS / "run_check_ranks.py"

# Megatron pads this vocabulary to 512 ids.
VOCAB_SIZE = 510
BASE = f"""
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 64
    --max-position-embeddings 64 --position-embedding-type rope --num-experts 8 --moe-ffn-hidden-size 48
    --moe-router-topk 2 --micro-batch-size 2 --global-batch-size 8 --train-iters 1 --lr 1e-3 --mock-data
    --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 256
    --eval-iters 0 --distributed-backend gloo --attention-dropout 0 --hidden-dropout 0
"""
LLAMA = "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights"
MTP = "--mtp-num-layers 1"
BF16 = "--bf16"
DISTRIBUTED = "--use-distributed-optimizer"

ARCHITECTURES = {
    "tied embeddings, biases, no gate": "",
    "untied embeddings, gate": LLAMA,
    "dense and MoE layers": f"{LLAMA} --moe-layer-freq ([0]+[1]*3)",
    "shared expert with gate": f"{LLAMA} --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate",
    "grouped-query attention with norms": (
        f"{LLAMA} --group-query-attention --num-query-groups 2 --kv-channels 24 --qk-layernorm"
    ),
    "multi-token prediction": f"{LLAMA} --moe-layer-freq 2 {MTP}",
    "expert bias": f"{LLAMA} --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "learned positions, untied": "--untie-embeddings-and-output-weights --position-embedding-type learned_absolute",
}


def hybrid(pattern: str, flags: str = LLAMA) -> str:
    """Return the flags of a hybrid model, whose number of layers replaces the number in `BASE`."""
    num_layers = len(pattern.partition("/")[0].replace("|", ""))
    return f"{flags} --num-layers {num_layers} --hybrid-layer-pattern={shlex.quote(pattern)}"


LATENT_ATTENTION = """
    --multi-latent-attention --qk-layernorm --q-lora-rank 32 --kv-lora-rank 24 --qk-head-dim 16 --qk-pos-emb-head-dim 8
    --v-head-dim 20
"""
# Patterns of hybrid models, and the number of layers of each kind.
HYBRIDS = {
    "hybrid": (hybrid("*-*E*E"), {"attention": 3, "MLP": 1, "MoE": 2}),
    "hybrid with free order, biases": (hybrid("**E-E", "--swiglu"), {"attention": 2, "MLP": 1, "MoE": 2}),
    "hybrid with prediction, shared expert": (
        hybrid("*E*-/*E/*E", f"{LLAMA} --moe-shared-expert-intermediate-size 32"),
        {"attention": 2, "MLP": 1, "MoE": 1},
    ),
    "hybrid with latent attention": (
        hybrid("+-+E", f"{LLAMA} {LATENT_ATTENTION}"),
        {"multi-latent attention": 2, "MLP": 1, "MoE": 1},
    ),
}
GATED_DELTA_NET = """
    --linear-num-key-heads 2 --linear-num-value-heads 4 --linear-key-head-dim 16 --linear-value-head-dim 24
"""
HYBRIDS["hybrid with gated delta nets"] = (
    hybrid("GEG-*E", f"{LLAMA} {GATED_DELTA_NET}"),
    {"gated delta net": 2, "attention": 1, "MLP": 1, "MoE": 2},
)
# The machine of the check may lack DeepEP.
FLEX = f"{LLAMA} {BF16} --expert-model-parallel-size 2 --moe-token-dispatcher-type flex"
# Layouts whose bytes are compared rank by rank.
LAYOUTS = {
    "expert parallel, bf16, distributed optimizer": f"{LLAMA} {BF16} {DISTRIBUTED} --expert-model-parallel-size 2"
}
MORE_LAYOUTS = {
    "tensor parallel, tied, expert bias": (
        f"{BF16} --disable-bias-linear --tensor-model-parallel-size 2 --sequence-parallel "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    ),
    "interleaved pipeline, fp32, tied": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --swiglu"
    ),
    "data parallel, bf16, distributed optimizer": f"{LLAMA} {BF16} {DISTRIBUTED} --moe-layer-freq 2",
    "pipeline, multi-token prediction": f"{LLAMA} {BF16} {DISTRIBUTED} {MTP} --pipeline-model-parallel-size 2",
    "expert tensor parallel 1, fp32, distributed optimizer": (
        f"{LLAMA} {DISTRIBUTED} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2"
    ),
    "hybrid, interleaved pipeline, prediction": hybrid(
        "*-|*E|*|E*E/*E", f"{LLAMA} {BF16} {DISTRIBUTED} --pipeline-model-parallel-size 2"
    ),
    "gradients in bf16": f"{LLAMA} {BF16} --grad-reduce-in-bf16",
}
# Settings under which the activations of a forward pass on one rank are compared.
FORWARD = {
    "bf16": f"{LLAMA} {BF16}",
    "no gate, dropout": f"{BF16} --disable-bias-linear --hidden-dropout 0.1",
    "dense layers, shared expert, grouped queries": (
        f"{LLAMA} {BF16} --moe-layer-freq 2 --moe-shared-expert-intermediate-size 96 --group-query-attention "
        "--num-query-groups 2 --hidden-size 128"
    ),
    "recomputed MoE": f"{LLAMA} {BF16} --recompute-granularity selective --recompute-modules moe core_attn",
    "full recompute": (
        f"{LLAMA} {BF16} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "latent experts": f"{LLAMA} {BF16} --moe-latent-size 16",
    "latent attention": f"{LLAMA} {BF16} {LATENT_ATTENTION}",
    "recomputed norms, activations and up-projections": (
        f"{LLAMA} {BF16} {LATENT_ATTENTION} --v-head-dim 24 --moe-grouped-gemm --recompute-granularity selective "
        "--recompute-modules layernorm moe_act mla_up_proj"
    ),
    "half recomputed": f"{LLAMA} {BF16} --recompute-granularity full --recompute-method block --recompute-num-layers 2",
}
# Flags of a GPT model and its hybrid twin.
TWINS = {
    "plain": (LLAMA, hybrid("*E*E*E*E")),
    "pipeline": (
        f"{LLAMA} --moe-layer-freq 2 --pipeline-model-parallel-size 2 --global-batch-size 4",
        hybrid("*E*-|*E*-", f"{LLAMA} --pipeline-model-parallel-size 2 --global-batch-size 4"),
    ),
    "recomputed MoE": (
        f"{LLAMA} --recompute-granularity selective --recompute-modules moe core_attn",
        hybrid("*E*E*E*E", f"{LLAMA} --recompute-granularity selective --recompute-modules moe core_attn"),
    ),
    "latent attention, prediction": (
        f"{LLAMA} {LATENT_ATTENTION} {MTP} --moe-layer-freq ([0]+[1]*3)",
        hybrid("+-+E+E+E/+E", f"{LLAMA} {LATENT_ATTENTION}"),
    ),
}
KINDS = ("GPT", "hybrid")
# The largest allowed ratio between estimated and measured activations, in either direction. The estimate leaves out
# masks, indices and statistics of norms, 2 to 3 %. With dropout the estimate is 11 % too low, because a CPU keeps two
# bytes for an element of a dropout mask, and a GPU keeps one byte.
FORWARD_FACTOR = 1.15

# Flags of a run on 8 ranks, and the parts of its only error.
ERRORS = {
    "--pipeline-model-parallel-size 8": ["invalid settings: Number of layers should be divisible"],
    "--global-batch-size 40": ["--global-batch-size 40", "data parallel size 8 = 16; 32 or 48 would fit"],
    "--routing-mask for_2_ranks.safetensors --expert-model-parallel-size 4": ["rank-local", "size 2", "4"],
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model data.bin": ["data.bin) cannot be made"],
    "--hybrid-layer-pattern /*E": ["invalid settings: ZeroDivisionError"],
    "--hybrid-layer-pattern *E*E --pipeline-model-parallel-size 8": ["the model cannot be made: "],
    "--load save/nowhere --ckpt-step 3": ["holds no sound checkpoint: save/nowhere/iter_0000003 does not exist"],
}
# Flags of `BASE` that no run may lack, and the errors without the flags.
MISSING = {
    "--lr": "no learning rate: pass --lr",
    "--train-iters": "no length of training: pass --train-iters or --train-samples",
    "--seq-length": "no sequence length: pass --seq-length",
}
MANY_RANKS = "more ranks than there are GPUs"


@dataclass(frozen=True)
class Bench:
    """Runs `run_check_ranks.py` in a folder that has a dataset and masks.

    Attributes:
        working_folder: the folder with the files that flags name.
        scratch: a folder for cases and answers.
    """

    working_folder: Path
    scratch: Path

    def run(
        self,
        command: str,
        cases: Mapping[str, str | Sequence[str]],
        *,
        ranks: dict[str, int] | None = None,
        processes: int = 1,
    ) -> list[dict[str, Any]]:
        """Run a command of the script on cases.

        Args:
            command: the command of the script.
            cases: by name, the flags of each case besides `BASE`, or all words of its command line.
            ranks: the number of ranks that a case is checked for; 1 by default.
            processes: the number of ranks of the script.

        Returns:
            For each process, the answers by the names of the cases.
        """
        folder = Path(tempfile.mkdtemp(prefix=command, dir=self.scratch))
        described = {}
        for name, flags in cases.items():
            # --global-batch-size cannot be as large as these ranks need, but the default of Megatron can.
            base = BASE.replace("--global-batch-size 8", "") if name == MANY_RANKS else BASE
            if isinstance(flags, str):
                flags = [*shlex.split(base), "--routing-mask", "shared.safetensors", *shlex.split(flags)]
            described[name] = {"ranks": (ranks or {}).get(name, 1), "flags": flags}
        (folder / "cases.json").write_text(json.dumps(described))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASTER_ADDR", "localhost")
            patch.setenv("MASTER_PORT", str(free_port()))
            run_script_as_ranks(SCRIPT, folder, command, self.working_folder, world_size=processes, timeout=500)
        return [json.loads((folder / f"answers{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory) -> Path:
    """A folder with a dataset, and with masks for it: of the model, of any number of layers, and rank-local."""
    folder = tmp_path_factory.mktemp("run_check")
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "data", optimal_dtype(VOCAB_SIZE)) as writer:
        for _ in range(30):
            writer.add_document(np.minimum(random.zipf(1.3, size=100), VOCAB_SIZE) - 1)
    frequency = count_token_frequency([str(folder / "data")], VOCAB_SIZE, workers=1)
    recipe = MaskRecipe(8, 4, "uniform", 0.4, frequent_visible_experts=4)
    build_routing_mask(recipe, frequency=frequency).save(folder / "mask.safetensors")
    recipe = MaskRecipe.from_preset("smoe", 8, 5, shared_table=True)
    build_routing_mask(recipe, vocab_size=VOCAB_SIZE).save(folder / "shared.safetensors")
    recipe = MaskRecipe(8, 4, "rank-local", 0.4, 4, expert_model_parallel_size=2)
    build_routing_mask(recipe, frequency=frequency).save(folder / "for_2_ranks.safetensors")
    return folder


@pytest.fixture(scope="module")
def bench(working_folder, tmp_path_factory) -> Bench:
    return Bench(working_folder, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def reports(bench) -> dict[str, Any]:
    """The reports of all cases, made by one process."""
    layouts = LAYOUTS | MORE_LAYOUTS
    errors = {flags: f"--global-batch-size 16 {flags}" for flags in ERRORS}
    ranks = dict.fromkeys([*layouts, "flex dispatcher"], 2) | dict.fromkeys(errors, 8)
    ranks[MANY_RANKS] = 1_000_000_007
    twins = {
        f"{kind} twin, {name}": flags for name, pair in TWINS.items() for kind, flags in zip(KINDS, pair, strict=True)
    }
    ranks |= {name: 2 for name, flags in twins.items() if "pipeline" in flags}
    libraries = {"flex dispatcher": FLEX, "Mamba": hybrid("*-ME")}
    base = [*shlex.split(BASE), "--routing-mask", "shared.safetensors"]
    libraries["frequent ids with more experts"] = f"{LLAMA} --routing-mask mask.safetensors"
    missing = {f"without {flag}": without_flags(base, flag) for flag in MISSING}
    missing["without required flags"] = [*without_flags(base, " ".join(MISSING)), "--save", "elsewhere", "--sft"]
    cases = ARCHITECTURES | hybrids() | FORWARD | layouts | errors | twins | libraries | missing | {MANY_RANKS: ""}
    return bench.run("report", cases, ranks=ranks)[0]


@pytest.fixture(scope="module")
def built(bench) -> dict[str, Any]:
    return bench.run("build", ARCHITECTURES | hybrids() | FORWARD)[0]


def hybrids() -> dict[str, str]:
    """Return the flags of the models in `HYBRIDS`."""
    return {name: flags for name, (flags, _) in HYBRIDS.items()}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS, *FORWARD])
def test_parameters_are_those_of_the_built_model(name, reports, built):
    parameters = reports[name]["parameters"]
    assert parameters["total"] == built[name]["parameters"]
    assert parameters["routed_experts"] == built[name]["expert_parameters"]
    assert sum(parameters["parts"].values()) == parameters["total"]


def test_operations_follow_the_mask(reports):
    """40 % of the tokens use two experts, the others one."""
    all_use_two, fewer = (reports[name] for name in ("untied embeddings, gate", "frequent ids with more experts"))
    assert fewer["parameters"]["mean_experts_per_token"] == pytest.approx(1.4)
    experts = 6 * 4 * 3 * 64 * 48  # three matrices of an expert in each of four layers
    difference = all_use_two["cost"]["flops_per_token"] - fewer["cost"]["flops_per_token"]
    assert difference == pytest.approx(0.6 * experts)


def test_operations_of_a_run(reports):
    cost = reports["bf16"]["cost"]
    assert cost["tokens"] == 8 * 64
    assert cost["flops"] == cost["flops_per_token"] * cost["tokens"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_of_a_hybrid_model_are_counted_by_kind(name, reports):
    layers, expected = reports[name]["layers"], HYBRIDS[name][1]
    assert {kind: number for kind, number in layers["kinds"].items() if number} == expected
    assert layers["stages"] == [[sum(expected.values())]]
    assert layers["multi_token_prediction"] == HYBRIDS[name][0].count("/")


def test_model_chunks_of_a_hybrid_model(reports):
    report = reports["hybrid, interleaved pipeline, prediction"]
    assert report["layers"]["stages"] == [[2, 1], [2, 3]]
    assert report["layout"]["virtual_pipeline"] == 2


@pytest.mark.parametrize("name", TWINS)
def test_hybrid_twin_needs_what_its_gpt_model_needs(name, reports):
    gpt, twin = (reports[f"{kind} twin, {name}"] for kind in KINDS)
    assert (gpt["errors"], twin["errors"]) == ([], [])
    assert twin["parameters"] == gpt["parameters"]
    assert twin["memory"] == gpt["memory"]
    assert twin["layout"] == gpt["layout"]


def test_parameters_of_latent_experts(reports):
    parts, without = (reports[name]["parameters"]["parts"] for name in ("latent experts", "untied embeddings, gate"))
    projections = 4 * 2 * 64 * 16
    assert parts["routed experts"] * 64 == without["routed experts"] * 16
    assert parts["layers without routed experts"] == without["layers without routed experts"] + projections


def test_missing_library_of_the_flex_dispatcher_is_a_note(reports):
    flex, expert_parallel = reports["flex dispatcher"], reports["expert parallel, bf16, distributed optimizer"]
    assert not flex["errors"]
    assert any("deepep needs DeepEP" in note for note in flex["notes"])
    assert flex["parameters"] == expert_parallel["parameters"]


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba_ssm is installed")
def test_missing_library_of_mamba_layers_is_a_note(reports):
    mamba = reports["Mamba"]
    assert not mamba["errors"]
    assert any(note.startswith("--hybrid-layer-pattern with M needs the Python package") for note in mamba["notes"])
    assert mamba["parameters"] is None


@pytest.mark.parametrize("name", FORWARD)
def test_activations_are_near_those_of_a_forward_pass(name, reports, built):
    (memory,) = reports[name]["memory"]["stages"]
    estimate = memory["activations"] + memory["logits"]
    assert built[name]["kept"] / FORWARD_FACTOR < estimate < built[name]["kept"] * FORWARD_FACTOR


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MORE_LAYOUTS])
def test_bytes_are_those_of_a_run(name, bench, reports):
    report = reports[name]
    case = {name: (LAYOUTS | MORE_LAYOUTS)[name]}
    measured = [answer[name] for answer in bench.run("measure", case, processes=2)]
    assert sum(rank["parameters"] for rank in measured) == report["parameters"]["total"]
    stages = report["memory"]["stages"]
    for part in ("weights", "gradients", "routing_mask"):
        for rank in measured:
            assert rank[part] == stages[rank["stage"]][part]
    # The ranks that share an optimizer differ by the padding of its buckets.
    for stage, memory in enumerate(stages):
        optimizers = [rank["optimizer"] for rank in measured if rank["stage"] == stage]
        assert sum(optimizers) == len(optimizers) * memory["optimizer"]


# Flags of models whose numbers of parameters were published.
MIXTRAL = """
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --seq-length 4096 --max-position-embeddings 32768 --position-embedding-type rope --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --num-experts 8
    --moe-router-topk 2 --tokenizer-type NullTokenizer --vocab-size 32000 --bf16 --use-distributed-optimizer
    --micro-batch-size 1 --global-batch-size 256 --train-iters 10 --lr 1e-4 --mock-data
    --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4 --expert-model-parallel-size 8
"""
DEEPSEEK_V3 = """
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --seq-length 4096
    --max-position-embeddings 4096 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --multi-latent-attention --q-lora-rank 1536
    --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --num-experts 256
    --moe-ffn-hidden-size 2048 --moe-router-topk 8 --moe-shared-expert-intermediate-size 2048
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-layer-freq ([0]*3+[1]*58)
    --mtp-num-layers 1 --tokenizer-type NullTokenizer --vocab-size 129280 --make-vocab-size-divisible-by 1280 --bf16
    --use-distributed-optimizer --micro-batch-size 1 --global-batch-size 8192 --train-iters 10 --lr 1e-4 --mock-data
    --pipeline-model-parallel-size 16 --decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2
    --expert-model-parallel-size 64
"""


@pytest.fixture
def check(working_folder):
    """Run `--check` as a user does."""

    def check(ranks: int, flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "maskmoe.training.pretrain", "--check", str(ranks), *shlex.split(flags)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            command, cwd=working_folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert "Traceback" not in process.stderr
        return process

    return check


@pytest.fixture
def mask_file(tmp_path):
    """Write a routing mask of the given sizes."""

    def write(vocab_size: int, num_experts: int, num_layers: int) -> Path:
        recipe = MaskRecipe.from_preset("smoe", num_experts, num_layers, shared_table=True)
        build_routing_mask(recipe, vocab_size=vocab_size).save(tmp_path / "mask.safetensors")
        return tmp_path / "mask.safetensors"

    return write


def error_lines(process: subprocess.CompletedProcess) -> list[str]:
    """Return the errors that a process wrote to stderr."""
    return [line for line in process.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_mixtral(check, mask_file):
    """The published numbers are 46.7 billion parameters, 12.9 billion of them active."""
    process = check(64, f"{MIXTRAL} --routing-mask {mask_file(32000, 8, 32)}")
    assert (process.returncode, error_lines(process)) == (0, [])
    assert "46.70 B  46,702,792,704" in process.stdout
    assert "12.88 B  12,879,925,248  for a token with 2 experts" in process.stdout
    assert "TP 1 × PP 4 × CP 1 × DP 16 = 64" in process.stdout
    assert "ETP 1 × EP 8 × PP 4 × expert DP 2 = 64" in process.stdout
    assert "256 samples = 16 micro-batches × 1 × DP 16; 1,048,576 tokens" in process.stdout
    assert "4 × 4+4" in process.stdout
    assert process.stdout.endswith("no errors found\n")


@pytest.mark.slow
def test_deepseek_v3(check, mask_file):
    """The published numbers are 671 billion parameters without multi-token prediction, 37 billion of them active."""
    process = check(1024, f"{DEEPSEEK_V3} --routing-mask {mask_file(129280, 256, 62)} --json")
    assert (process.returncode, error_lines(process)) == (0, [])
    report = json.loads(process.stdout)
    assert report["errors"] == []
    parameters = report["parameters"]
    assert parameters["total"] - parameters["parts"]["multi-token prediction"] == 671_026_404_352
    assert parameters["experts_per_token"] == 8
    assert round(parameters["active"] / 1e9, 2) == 37.55
    assert report["layers"]["stages"] == [[3], *[[4]] * 14, [2]]
    assert (report["layout"]["ranks"], report["layout"]["data"], report["layout"]["expert_data"]) == (1024, 64, 1)
    totals = [stage["total"] for stage in report["memory"]["stages"]]
    assert max(totals) == totals[report["memory"]["largest_stage"]]


# A run with many errors, on 24 ranks, and a part of each error.
FAULTY = (
    f"{BASE} --num-experts 12 --vocab-size 500 --pipeline-model-parallel-size 2 --expert-model-parallel-size 5 "
    "--global-batch-size 9 --spec a b --routing-mask mask.safetensors --data-path nowhere data elsewhere "
    "--save data.idx --tensorboard-dir events --load no_checkpoint"
).replace("--mock-data", "")
FAULTS = (
    "--spec, --experimental-attention-variant, ",
    "24 ranks cannot be divided",
    "vocabulary size is 510, the model's is 500; its number of experts is 8, the model's is 12",
    "--save data.idx: cannot write in",
    "nowhere.idx does not exist",
    "elsewhere.idx does not exist",
)


def test_all_errors_at_once(check, working_folder):
    before = files_and_times(working_folder)
    process = check(24, f"{FAULTY} --json")
    assert process.returncode == 2
    report = json.loads(process.stdout)
    errors = report["errors"]
    assert error_lines(process) == [f"error: {error}" for error in errors]
    assert len(set(errors)) == len(errors)
    for fault in FAULTS:
        assert sum(fault in error for error in errors) == 1, (fault, errors)
    (error,) = [error for error in errors if "24 ranks" in error]
    assert "20 or 30 ranks would fit" in error
    assert report["notes"] == ["--load no_checkpoint holds no checkpoint: training starts from the beginning"]
    assert (report["layout"], report["can_start"], report["missing"]) == (None, False, [])
    assert files_and_times(working_folder) == before


def test_missing_inputs_are_errors_that_come_last():
    missing = MissingInput("dataset", "--data-path P", ("maskmoe preprocess", "maskmoe count"))
    report = Report(("an error",), missing=(missing,))
    line = "no dataset: pass --data-path P, made by: maskmoe preprocess && maskmoe count"
    assert report.errors == ("an error", line)
    assert "missing       dataset: the run cannot start yet" in report.to_text()
    content = report.to_json()
    assert (content["can_start"], content["errors"]) == (False, ["an error", line])
    assert content["missing"] == [{"what": "dataset", "flags": "--data-path P", "commands": [*missing.commands]}]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ("NullTokenizer", "pass --data-path with a dataset that was made with NullTokenizer, or --mock-data"),
        (
            "HuggingFaceTokenizer",
            "preprocess --input TEXT.jsonl --tokenizer-type HuggingFaceTokenizer",
        ),
    ],
)
def test_only_tokenizers_of_preprocess_lead_to_its_command(tokenizer, expected):
    paths = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")
    unset = dict.fromkeys((*paths, "per_split_data_args_path", "mock_data", "tokenizer_model"))
    (missing,) = missing_dataset(Namespace(tokenizer_type=tokenizer, **unset))
    assert expected in str(missing)
    assert str(missing).startswith("no dataset: pass --data-path")


def files_and_times(folder: Path) -> dict[Path, int]:
    """Return when each file under a folder was last changed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_time_does_not_depend_on_the_number_of_ranks(reports):
    """All reports are made by one process that has a time limit; a list of this many ranks would need 8 GB."""
    report = reports[MANY_RANKS]
    assert (report["layout"]["ranks"], report["layout"]["global_batch"]) == (1_000_000_007, 2_000_000_014)
    assert report["parameters"] == reports["tied embeddings, biases, no gate"]["parameters"]
    assert report["errors"] == []


@pytest.mark.parametrize("flags", ERRORS)
def test_error(flags, reports):
    (error,) = reports[flags]["errors"]
    for part in ERRORS[flags]:
        assert part in error


def test_missing_flags_are_reported_with_all_other_errors(reports):
    errors = reports["without required flags"]["errors"]
    assert [error for error in errors if error in MISSING.values()] == [
        MISSING[flag] for flag in ("--seq-length", "--train-iters", "--lr")
    ]
    assert errors[0].startswith("--sft is not supported.")
    assert "invalid settings: assert args.encoder_seq_length is not None" in errors


@pytest.mark.parametrize("flag", ["--lr", "--train-iters"])
def test_model_is_measured_without_flags_that_do_not_change_it(flag, reports):
    assert reports[f"without {flag}"]["parameters"] == reports["tied embeddings, biases, no gate"]["parameters"]


@pytest.mark.parametrize(
    ("ranks", "flags", "errors"),
    [
        (1, "'0:2 256:4 512:8' --train-samples 24", []),
        (
            2,
            "'0:4 256:6' --train-samples 10",
            ["{} 6 is not divisible by --micro-batch-size 2 × data parallel size 2 = 4; 4 or 8 would fit"],
        ),
        (1, "4 --train-samples 4", ["{} '4' cannot be read: "]),
    ],
)
def test_schedule_of_batch_sizes(ranks, flags, errors, monkeypatch):
    words = without_flags(shlex.split(BASE), "--global-batch-size --train-iters")
    schedule = "--step-batch-size-schedule"
    monkeypatch.setattr(sys, "argv", ["pretrain", *words, schedule, *shlex.split(flags)])
    args = parse_args(add_maskmoe_arguments)
    args.world_size = ranks
    found = list(layout_errors(args))
    assert len(found) == len(errors)
    for error, expected in zip(found, errors, strict=True):
        assert error.startswith(expected.format(schedule))


def test_batch_sizes_before_a_checkpoint_may_be_any(monkeypatch):
    words = without_flags(shlex.split(BASE), "--global-batch-size --train-iters")
    flags = ["--step-batch-size-schedule", "0:2 256:4 512:8", "--train-samples", "24"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *words, *flags])
    args = parse_args(add_maskmoe_arguments)
    args.world_size = 2
    assert [error.partition(" is ")[0] for error in layout_errors(args)] == ["--step-batch-size-schedule 2"]
    assert list(layout_errors(args, iteration=2)) == []


def test_batch_that_megatron_may_decrease_need_not_fit(monkeypatch):
    for flags, fits in (([], False), (["--decrease-batch-size-if-needed"], True)):
        monkeypatch.setattr(sys, "argv", ["pretrain", *shlex.split(BASE), *flags])
        args = parse_args(add_maskmoe_arguments)
        args.world_size = 3
        assert (list(layout_errors(args)) == []) == fits


@pytest.mark.slow
@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_a_machine_with_gpus_is_judged_by_its_packages(bench):
    needing = "--transformer-impl transformer_engine"
    (reports,) = bench.run("report_on_a_gpu", {"defaults": LLAMA, "given": f"{LLAMA} {BF16} {DISTRIBUTED} {needing}"})
    assert reports["defaults"]["errors"] == []
    (note,) = reports["defaults"]["notes"]
    assert note.startswith("Transformer Engine is not installed, so the default is --transformer-impl local")
    errors = reports["given"]["errors"]
    assert sum(error.startswith("--transformer-impl transformer_engine needs Transformer") for error in errors) == 1


@pytest.mark.slow
def test_fused_rotary_embedding_of_latent_attention_is_judged(bench):
    """The machine of the check needs no Transformer Engine to refuse what Megatron refuses."""
    on_gpus = f"{LLAMA} --multi-latent-attention --rope-type rope --distributed-backend nccl"
    cases = {"fused": on_gpus, "not fused": f"{on_gpus} --no-rope-fusion"}
    (reports,) = bench.run("report", cases)
    assert reports["fused"]["errors"] == ["invalid settings: apply_rope_fusion for MLA only works with YARN RoPE."]
    assert reports["not fused"]["errors"] == []


def test_request(monkeypatch):
    def request(*flags: str) -> tuple[int | None, bool]:
        monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
        request = requested_check()
        return request.check, request.check_json

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert request("--num-layers", "4") == (None, False)
    assert request("--check", "--num-layers", "4") == (1, False)
    assert request("--num-layers", "4", "--check", "64", "--json") == (64, True)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert request("--check") == (16, False)
    with pytest.raises(UserError, match="--check must be at least 1, not 0"):
        request("--check", "0")
    with pytest.raises(UserError, match="pass --check, too"):
        request("--json")


def test_mean_number_of_experts_is_that_of_the_layers_with_experts():
    recipe = MaskRecipe.from_preset("smoe", 8, 4, hash_layers=HashLayers(2, 2, "uniform"))
    mask = build_routing_mask(recipe, vocab_size=50)
    layers = {
        freq: FeedForwardLayers.of_frequency(list(map(int, freq)), len(freq)) for freq in ("1111", "0111", "0011")
    }
    assert ExpertUse.from_mask(mask, 4, layers["1111"]) == ExpertUse(4, 3.0)
    assert ExpertUse.from_mask(mask, 4, layers["0111"]).mean == pytest.approx(10 / 3)
    assert ExpertUse.from_mask(mask, 4, layers["0011"]) == ExpertUse(4, 4.0)
    assert ExpertUse.from_mask(mask, 2, layers["1111"]) == ExpertUse(2, 2.0)
    # A mask with a table for each MoE layer is for the MoE layers in order.
    assert ExpertUse.from_mask(mask, 4, FeedForwardLayers.of_pattern("-E-EE*E")) == ExpertUse(4, 3.0)
    shared = build_routing_mask(MaskRecipe.from_preset("hash", 8, 1, shared_table=True), vocab_size=50)
    assert ExpertUse.from_mask(shared, 4, layers["1111"]) == ExpertUse(4, 1.0)
    assert ExpertUse.from_mask(None, 4, layers["1111"]) == ExpertUse(4, 4)


def test_text_of_the_layers_of_a_hybrid_model():
    parts = dict.fromkeys(PARTS, 10**8)
    chunk = Chunk(parts, 8 * 10**7, 0, tuple("GE*E+-M-E"), ("*E", "*E"), True, True)
    model = ModelParameters(chunk, ((chunk, chunk), (chunk,)), 8, ExpertUse(2, 2), mask_bytes=0, padded_vocab_size=512)
    lines = Report((), model=model).to_text().splitlines()
    assert lines[0] == (
        "layers        9: 1 attention, 1 multi-latent attention, 1 gated delta net, 1 Mamba, 2 MLP, "
        "3 MoE; multi-token prediction: 2 attention, 2 MoE"
    )
    assert lines[1] == "  of stages   9+9, 9"


def test_text_of_a_report():
    layout = Layout(16, 2, 2, 1, 4, 1, 1, 2, 1, 64, 4096)
    chunk = Chunk(dict.fromkeys(PARTS, 10**8), 8 * 10**7, 0, ("*-", "*E", "*E", "*E"), (), True, True)
    use = ExpertUse(2, 1.4)
    model = ModelParameters(chunk, ((chunk, chunk), (chunk,)), 8, use, mask_bytes=0, padded_vocab_size=512)
    stages = tuple(
        StageMemory(gib << 30, gib << 29, 0, 0, 0, 0, 0, 0, doubled_rows=gib << 26, micro_batches_in_flight=4 / gib)
        for gib in (2, 4)
    )
    memory = MemoryReport(stages, 1.4)
    cost = TrainingCost(2.5e9, 10**11)
    report = Report((), ("something",), layout, model, memory, cost)
    lines = report.to_text().splitlines()
    for line in (
        "ranks         16",
        "  dense parts TP 2 × PP 2 × CP 1 × DP 4 = 16",
        "  experts     ETP 1 × EP 4 × PP 2 × expert DP 2 = 16",
        "step          64 samples = 16 micro-batches × 1 × DP 4; 262,144 tokens",
        "layers        4: 4 attention, 1 MLP, 3 MoE",
        "  of stages   4+4, 4",
        "parameters    0.50 B  500,000,000",
        "active        0.33 B  325,000,000  for a token with 2 experts",
        "              0.32 B  317,500,000  on average, with 1.4 experts a token",
        "memory        GiB a rank, pipeline stage 1 of 0 to 1, 1 micro-batches in flight",
        "  weights and buffers            4.00  exact",
        "  gradients                      2.00  exact",
        "  total                          6.00",
        "  total of stages           3.00, 6.00",
        "cost          2.5 GFLOPs a token, forward and backward",
        "  whole run   100 B tokens, 2.5e+20 FLOPs",
        "note: something",
        "no errors found",
    ):
        assert line in lines
    assert any("a rank that gets twice as many rows needs 0.25 GiB more" in line for line in lines)
    assert not any("optimizer" in line for line in lines)
    assert Report(("an error",)).to_text() == ""


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("group", [4, 6])
@pytest.mark.parametrize("micro_batches", [1, 4, 8, 64])
def test_micro_batches_in_flight(chunks, group, micro_batches):
    for stage in range(4):
        layout = Layout(4, 1, 4, 1, 1, 1, chunks, group, 1, micro_batches, 8)
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: 4, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, warm_up, remaining = get_pp_rank_microbatches(micro_batches, chunks, group, p2p_communicator=communicator)
        # After the warm-up, a backward pass follows every forward pass.
        assert layout.micro_batches_in_flight(stage) * chunks == pytest.approx(warm_up + (remaining > 0))
