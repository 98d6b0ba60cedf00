"""`--check`: its counts against models that are really built, its errors, its arithmetic."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from support.launchers import RANK_SCRIPTS

from maskmoe.check.activations import micro_batches_in_flight
from maskmoe.check.command import ranks_to_check
from maskmoe.check.layout import Layout
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.frequency import count_token_frequency
from maskmoe.routing_mask.mask import build_routing_mask

SCRIPT = str(RANK_SCRIPTS / "run_check_ranks.py")

# A vocabulary that is padded, to 512 ids and with tensor parallelism 2 to 768.
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
    "norms over all heads": (
        f"{LLAMA} --group-query-attention --num-query-groups 2 --qk-layernorm --qk-layernorm-all-heads"
    ),
    "biases of query, key and value alone": f"{LLAMA} --add-qkv-bias",
    "multi-token prediction": f"{LLAMA} --moe-layer-freq 2 {MTP}",
    "expert bias": f"{LLAMA} --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "learned positions, untied": "--untie-embeddings-and-output-weights --position-embedding-type learned_absolute",
}
# Needs Transformer Engine, but to be counted.
LATENT_EXPERTS = f"{LLAMA} --moe-latent-size 16 --transformer-impl transformer_engine"
# Rank for rank.
LAYOUTS = {
    "expert parallel, bf16, distributed optimizer": f"{LLAMA} {BF16} {DISTRIBUTED} --expert-model-parallel-size 2",
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
    "gradients in bf16": f"{LLAMA} {BF16} --grad-reduce-in-bf16",
    "fp16": f"{LLAMA} --fp16",
    "sgd": f"{LLAMA} {BF16} --optimizer sgd",
}
# What a forward pass keeps, on one rank.
FORWARD = {
    "fp32": LLAMA,
    "bf16": f"{LLAMA} {BF16}",
    "no gate, dropout": f"{BF16} --disable-bias-linear --attention-dropout 0.1 --hidden-dropout 0.1",
    "dense layers, shared expert, grouped queries": (
        f"{LLAMA} {BF16} --moe-layer-freq 2 --moe-shared-expert-intermediate-size 96 --group-query-attention "
        "--num-query-groups 2 --hidden-size 128"
    ),
    "recomputed scores": f"{LLAMA} {BF16} --recompute-granularity selective",
    "recomputed MoE": f"{LLAMA} {BF16} --recompute-granularity selective --recompute-modules moe core_attn",
    "full recompute": (
        f"{LLAMA} {BF16} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "half recomputed": f"{LLAMA} {BF16} --recompute-granularity full --recompute-method block --recompute-num-layers 2",
}
# How far the estimate of what a forward pass keeps may be from what it does keep, either way. 2 to 3 % are left out:
# masks, indices, statistics of norms; with dropout 11 %, since a CPU keeps its masks in bf16, a GPU in bytes.
FORWARD_FACTOR = 1.15

# Flags of a run on 8 ranks, and what the one error names.
ERRORS = {
    "--pipeline-model-parallel-size 8": ["--num-layers 4", "1, 2, 4 would fit"],
    "--global-batch-size 40": ["--global-batch-size 40", "data parallel size 8 = 16; 32 or 48 would fit"],
    "--num-attention-heads 3": ["num_attention_heads"],
    "--routing-mask nowhere.safetensors": ["nowhere.safetensors"],
    "--routing-mask for_2_ranks.safetensors --expert-model-parallel-size 4": ["rank-local", "size 2", "4"],
    "--routing-mask data.bin": ["data.bin"],
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model data.bin": ["data.bin) cannot be made"],
    "--load save/nowhere --ckpt-step 3": ["save/nowhere", "iter_0000003"],
}


@dataclass(frozen=True)
class Bench:
    """Runs `run_check_ranks.py`."""

    workplace: Any
    folder: Path

    def __call__(
        self, what: str, cases: dict[str, str], *, ranks: dict[str, int] | None = None, processes: int = 1
    ) -> list[dict[str, Any]]:
        """The answers to cases, flags by name, of runs of one rank or so many: one dictionary a process."""
        folder = self.folder / f"{what}_{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        base = [*shlex.split(BASE), "--routing-mask", str(self.folder.parent / "mask.safetensors")]
        described = {
            name: {"ranks": (ranks or {}).get(name, 1), "flags": [*base, *shlex.split(flags)]}
            for name, flags in cases.items()
        }
        (folder / "cases.json").write_text(json.dumps(described))
        outcome = self.workplace.execute([SCRIPT, what, str(folder)], folder, processes)
        assert not any(outcome.exit_codes), outcome.report()
        return [json.loads((folder / f"{what}{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def bench(workplace, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("run_check")
    # Shared by all layers, so that it fits any number of them.
    recipe = MaskRecipe.from_preset("smoe", 8, 5, shared_table=True)
    build_routing_mask(recipe, vocab_size=VOCAB_SIZE).save(folder / "mask.safetensors")
    recipe = MaskRecipe(8, 4, "rank-local", 0.4, 4, expert_model_parallel_size=2)
    frequency = count_token_frequency([str(workplace.folder / "data")], VOCAB_SIZE, workers=1)
    build_routing_mask(recipe, frequency=frequency).save(workplace.folder / "for_2_ranks.safetensors")
    (folder / "cases").mkdir()
    return Bench(workplace, folder / "cases")


@pytest.fixture(scope="module")
def estimates(bench) -> dict[str, Any]:
    layouts = LAYOUTS | MORE_LAYOUTS
    errors = {flags: f"--global-batch-size 16 {flags}" for flags in ERRORS}
    ranks = dict.fromkeys(layouts, 2) | dict.fromkeys(errors, 8)
    cases = ARCHITECTURES | FORWARD | layouts | errors | {"latent experts": LATENT_EXPERTS}
    return bench("estimate", cases, ranks=ranks)[0]


@pytest.fixture(scope="module")
def built(bench) -> dict[str, Any]:
    return bench("build", ARCHITECTURES | FORWARD)[0]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FORWARD])
def test_parameters_are_those_of_the_built_model(name, estimates, built):
    assert estimates[name]["parameters"] == built[name]["parameters"]
    assert estimates[name]["expert_parameters"] == built[name]["expert_parameters"]
    assert sum(estimates[name]["parts"].values()) == estimates[name]["parameters"]


def test_parameters_of_latent_experts(estimates):
    parts, without = estimates["latent experts"]["parts"], estimates["untied embeddings, gate"]["parts"]
    projections = 4 * 2 * 64 * 16
    assert parts["routed experts"] * 64 == without["routed experts"] * 16
    assert parts["layers without routed experts"] == without["layers without routed experts"] + projections


@pytest.mark.parametrize("name", FORWARD)
def test_activations_are_near_those_of_a_forward_pass(name, estimates, built):
    (memory,) = estimates[name]["memory"]
    # The logits themselves are needed while the cross entropy is computed, and not kept.
    estimate = memory["activations"] + memory["logits"] - estimates[name]["bytes_of_logits"]
    assert built[name]["kept"] / FORWARD_FACTOR < estimate < built[name]["kept"] * FORWARD_FACTOR


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)])
def test_bytes_are_those_of_a_run(name, bench, estimates):
    estimate = estimates[name]
    case = {name: (LAYOUTS | MORE_LAYOUTS)[name]}
    measured = [answer[name] for answer in bench("measure", case, processes=2)]
    assert sum(rank["parameters"] for rank in measured) == estimate["parameters"]
    for part in ("weights", "gradients", "routing_mask"):
        for rank in measured:
            assert rank[part] == estimate["memory"][rank["stage"]][part]
    # The ranks that share an optimizer differ by the padding of its buckets.
    for stage, memory in enumerate(estimate["memory"]):
        of_stage = [rank["optimizer"] for rank in measured if rank["stage"] == stage]
        assert sum(of_stage) == len(of_stage) * memory["optimizer"]


# The flags of models whose sizes were published.
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


@dataclass(frozen=True)
class Check:
    """A finished `--check`."""

    exit_code: int
    output: str
    errors: list[str]


@pytest.fixture
def check(workplace, tmp_path):
    def check(ranks: int | None, flags: str, **variables: str) -> Check:
        number = [] if ranks is None else [str(ranks)]
        command = [sys.executable, "-m", "maskmoe.training.pretrain", "--check", *number, *shlex.split(flags)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
        process = subprocess.run(
            command, cwd=workplace.folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert "Traceback" not in process.stderr
        errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        return Check(process.returncode, process.stdout, errors)

    return check


@pytest.fixture
def mask_file(tmp_path):
    def write(vocab_size: int, num_experts: int, num_layers: int) -> Path:
        recipe = MaskRecipe.from_preset("smoe", num_experts, num_layers, shared_table=True)
        build_routing_mask(recipe, vocab_size=vocab_size).save(tmp_path / "mask.safetensors")
        return tmp_path / "mask.safetensors"

    return write


@pytest.mark.slow
def test_mixtral(check, mask_file):
    """Published: 46.7 billion parameters, 12.9 billion of them active."""
    result = check(64, f"{MIXTRAL} --routing-mask {mask_file(32000, 8, 32)}")
    assert (result.exit_code, result.errors) == (0, [])
    assert "46.70 B  46,702,792,704" in result.output
    assert "12.88 B  12,879,925,248  for a token with 2 experts" in result.output
    assert "TP 1 × PP 4 × CP 1 × DP 16 = 64" in result.output
    assert "ETP 1 × EP 8 × PP 4 × expert DP 2 = 64" in result.output
    assert "256 samples = 16 micro-batches × 1 × DP 16; 1,048,576 tokens" in result.output
    assert "4 × 4+4" in result.output
    assert result.output.endswith("no errors found\n")


def test_deepseek_v3(check, mask_file):
    """Published: 671 billion parameters without multi-token prediction, 37 billion of them active."""
    result = check(1024, f"{DEEPSEEK_V3} --routing-mask {mask_file(129280, 256, 62)}")
    assert (result.exit_code, result.errors) == (0, [])
    (whole,) = re.findall(r"^parameters .* ([0-9,]+)$", result.output, re.MULTILINE)
    (prediction,) = re.findall(r"^  multi-token prediction +([0-9,]+)$", result.output, re.MULTILINE)
    assert int(whole.replace(",", "")) - int(prediction.replace(",", "")) == 671_026_404_352
    assert re.search(r"37\.55 B  [\d,]+  for a token with 8 experts", result.output)


def test_all_errors_at_once(check, workplace, files_and_times):
    before = files_and_times(workplace.folder)
    flags = (
        f"{BASE} --num-experts 12 --vocab-size 500 --pipeline-model-parallel-size 2 --expert-model-parallel-size 5 "
        "--global-batch-size 9 --spec a b --routing-mask mask.safetensors --data-path nowhere data elsewhere "
        f"--save {workplace.folder / 'data.idx'} --tensorboard-dir events --load no_checkpoint"
    )
    result = check(24, flags.replace("--mock-data", ""))
    assert result.exit_code == 2
    for culprit in (
        "--spec",
        "--num-experts 12 is not divisible by --expert-model-parallel-size 5",
        "24 ranks cannot be divided",
        "20 or 30 ranks would fit",
        "vocabulary size is 510, the model's is 500; its number of experts is 8, the model's is 12",
        "--save",
        "nowhere.idx",
        "elsewhere.idx",
    ):
        assert sum(culprit in error for error in result.errors) == 1, (culprit, result.errors)
    assert len(set(result.errors)) == len(result.errors)
    assert "no_checkpoint holds no checkpoint" in result.output
    assert files_and_times(workplace.folder) == before


@pytest.mark.parametrize("flags", ERRORS)
def test_error(flags, estimates):
    (error,) = estimates[flags]["errors"]
    assert all(culprit in error for culprit in ERRORS[flags]), error


def test_number_of_ranks(monkeypatch):
    def ranks(*flags: str) -> int | None:
        monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
        return ranks_to_check()

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks("--num-layers", "4") is None
    assert ranks("--check", "--num-layers", "4") == 1
    assert ranks("--num-layers", "4", "--check", "64") == 64
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert ranks("--check") == 16
    with pytest.raises(UserError, match="--check 0: a run has at least one rank"):
        ranks("--check", "0")


SIZES = st.integers(1, 12)


@given(ranks=st.integers(1, 300), sizes=st.tuples(*[SIZES] * 5), batch=st.integers(1, 300), micro_batch=SIZES)
def test_sizes_that_divide(ranks, sizes, batch, micro_batch):
    tensor, pipeline, context, expert, expert_tensor = sizes
    layout = Layout(
        ranks=ranks,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=expert,
        expert_tensor=expert_tensor,
        virtual_pipeline=1,
        micro_batch_group=pipeline,
        micro_batch=micro_batch,
        global_batch=batch,
        seq_length=8,
    )
    dense, experts = tensor * pipeline * context, expert_tensor * expert * pipeline
    divides = ranks % dense == 0 and ranks % experts == 0
    errors = list(layout.errors())
    assert bool(errors) == (not divides or batch % (micro_batch * (ranks // dense)) != 0)
    repaired = layout.repaired()
    assert not list(repaired.errors())
    assert repaired.ranks >= ranks and repaired.global_batch >= batch
    if not divides:
        fitting = [n for n in range(1, repaired.ranks + 1) if n % dense == 0 and n % experts == 0]
        assert fitting[-1] == repaired.ranks and f"{repaired.ranks} ranks would fit" in errors[0]
        if len(fitting) > 1:
            assert f"{fitting[-2]} or {fitting[-1]} ranks" in errors[0]


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
        # After the warm-up every forward pass is followed by a backward pass.
        assert micro_batches_in_flight(layout, stage) * chunks == pytest.approx(warm_up + (remaining > 0))
