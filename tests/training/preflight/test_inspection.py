"""Tests of `--check`: its counts against models that are built, its errors and its notes."""

import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import rebuild_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from support.datasets import write_documents
from support.launchers import run_as_ranks
from support.tensors import KeptBytes

from maskmoe.megatron_compat import cpu
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import count_token_frequency
from maskmoe.training.model.model_builder import model_config_from_args
from maskmoe.training.preflight.inspection import inspect_run
from maskmoe.training.ranks import temporary_process_groups
from maskmoe.training.run_checks import parse_and_check_args
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments


def report(ranks: int) -> dict[str, Any]:
    """Return the report of `--check` on the command line of this process."""
    return inspect_run(ranks).to_json()


def report_on_a_gpu(ranks: int) -> dict[str, Any]:
    """Return the report of `--check` on a machine with GPUs and the packages of this machine."""
    cpu.is_installed = lambda: False
    return report(ranks)


class MambaStub(torch.nn.Module):
    """A layer with ten parameters that forks the random state as Mamba's mixer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        with get_cuda_rng_tracker().fork():
            self.weight = torch.nn.Parameter(torch.rand(10))


def report_with_mamba(ranks: int) -> dict[str, Any]:
    """Return the report of `--check` where layers of Mamba can be built."""
    hybrid_stack_spec.submodules.mamba_layer = ModuleSpec(MambaStub)
    return report(ranks)


def build(ranks: int) -> dict[str, Any]:
    """Build the model on this rank alone, count its parameters, and measure what its forward pass keeps.

    Args:
        ranks: unused; a built model is always on one rank.
    """
    args = parse_args(add_maskmoe_arguments)
    validate_args(args)
    rebuild_tokenizer(args)
    config = model_config_from_args(args)
    config.megatron.finalize()
    model_parallel_cuda_manual_seed(1)
    # The previous model may have had other numbers of layers and of predicted tokens.
    get_moe_metrics_tracker().metrics.clear()
    MTPLossLoggingHelper.tracker.clear()
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    experts = [p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "expert_parameters": sum(experts),
        # The local modules cannot run experts with biases.
        "kept": None if args.add_bias_linear else _kept_by_forward(args, model),
    }


def measure(ranks: int) -> dict[str, Any]:
    """Take a step of training, and measure the bytes of this rank and its parameters that no other rank counts.

    Args:
        ranks: unused; the environment has the number of ranks.
    """
    args = parse_and_check_args(add_pretraining_arguments).args
    initialize_megatron()
    model, optimizer, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config_from_args(args)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.step()
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    buffers = [item for chunk in model for item in chunk.named_buffers()]
    return {
        "weights": sum(p.nbytes for p in parameters) + sum(b.nbytes for n, b in buffers if ".routing_mask." not in n),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters),
        "optimizer": _optimizer_bytes(optimizer, {p.untyped_storage().data_ptr() for p in parameters}),
        "routing_mask": sum(buffer.nbytes for name, buffer in buffers if ".routing_mask." in name),
        "parameters": sum(parameter.numel() for parameter in parameters if _is_first_replica(parameter)),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
    }


def _kept_by_forward(args: Namespace, model: torch.nn.Module) -> int:
    """Return the bytes that the forward pass of a micro-batch keeps for the backward pass, without parameters."""
    module = Float16Module(model.config, model) if args.bf16 else model
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab_size, (args.micro_batch_size, args.seq_length), generator=generator)
    positions = torch.arange(args.seq_length).expand_as(tokens)
    mask = None
    if args.create_attention_mask_in_dataloader:
        mask = torch.ones(len(tokens), 1, args.seq_length, args.seq_length, dtype=torch.bool).triu(1)
    with KeptBytes([*module.parameters(), *module.buffers()]) as kept:
        loss = module(tokens, positions, mask, labels=tokens)
    kept_bytes = kept.total()
    loss.sum().backward()
    return kept_bytes


def _optimizer_bytes(optimizer: Any, model_storages: set[int]) -> int:
    """Return the bytes of moments, and of main copies that are not parameters of the model."""
    total = 0
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if parameter.untyped_storage().data_ptr() not in model_storages:
                total += parameter.nbytes
            total += sum(t.nbytes for name, t in inner.state[parameter].items() if name != "step")
    return total


def _is_first_replica(parameter: torch.nn.Parameter) -> bool:
    """Return whether this rank is the first of those that hold a copy of a parameter."""
    if getattr(parameter, "shared", False):
        # The last stage has a copy of the embedding.
        return False
    is_divided = getattr(parameter, "tensor_model_parallel", False)
    if getattr(parameter, "allreduce", True):
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        tensor_rank = parallel_state.get_expert_tensor_parallel_rank()
        data_rank = parallel_state.get_expert_data_parallel_rank()
    return data_rank == 0 and (is_divided or tensor_rank == 0)


def answer_cases(command: str, cases: dict[str, dict[str, Any]], working_folder: Path) -> dict[str, dict[str, Any]]:
    """Return a command's answer for each case: the number of ranks and the flags that it is called for."""
    os.chdir(working_folder)
    answers_of = {
        function.__name__: function for function in (report, report_on_a_gpu, report_with_mamba, build, measure)
    }
    if command == "build":
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    answers = {}
    with temporary_process_groups():
        for name, case in cases.items():
            sys.argv = [sys.argv[0], *case["flags"]]
            answers[name] = answers_of[command](case["ranks"])
    return answers


# Megatron pads this vocabulary to 512 ids.
VOCAB_SIZE = 510
BASE = f"""
    --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 64
    --max-position-embeddings 64 --position-embedding-type rope --num-experts 8 --moe-ffn-hidden-size 48
    --moe-router-topk 2 --micro-batch-size 2 --global-batch-size 8 --train-iters 1 --lr 1e-3 --mock-data
    --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 256
    --eval-iters 0 --distributed-backend gloo --attention-dropout 0 --hidden-dropout 0
"""
LLAMA = "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights"
MTP = "--mtp-num-layers 1"
BF16 = "--bf16"
DISTRIBUTED = "--use-distributed-optimizer"
FP8 = "--transformer-impl transformer_engine --moe-grouped-gemm --fp8-format hybrid --fp8-recipe blockwise"

ARCHITECTURES = {
    "tied embeddings, biases, no gate": "",
    "untied embeddings, gate": LLAMA,
    "shared expert with gate": f"{LLAMA} --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate",
    "grouped-query attention with norms": (
        f"{LLAMA} --group-query-attention --num-query-groups 2 --kv-channels 24 --qk-layernorm"
    ),
    "multi-token prediction": f"{LLAMA} --moe-layer-freq 2 {MTP}",
    "expert bias": f"{LLAMA} --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
}


def hybrid(pattern: str, flags: str = LLAMA) -> str:
    """Return the flags of a hybrid model."""
    return f"{flags} --hybrid-layer-pattern={shlex.quote(pattern)}"


LATENT_ATTENTION = """
    --multi-latent-attention --qk-layernorm --q-lora-rank 32 --kv-lora-rank 24 --qk-head-dim 16 --qk-pos-emb-head-dim 8
    --v-head-dim 20
"""
# Patterns of hybrid models, and the number of layers of each kind.
HYBRIDS = {
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
    "expert parallel, bf16, distributed optimizer": f"{LLAMA} {BF16} {DISTRIBUTED} --expert-model-parallel-size 2",
    "tensor parallel, tied, expert bias": (
        f"{BF16} --disable-bias-linear --tensor-model-parallel-size 2 --sequence-parallel "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    ),
    "interleaved pipeline, fp32, tied": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --swiglu"
    ),
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
    "half recomputed": f"{LLAMA} {BF16} --recompute-granularity full --recompute-method block --recompute-num-layers 2",
}
# The largest allowed ratio between estimated and measured activations, in either direction. The estimate leaves out
# masks, indices and statistics of norms, 2 to 3 %. With dropout the estimate is 11 % too low, because a CPU keeps two
# bytes for an element of a dropout mask, and a GPU keeps one byte.
FORWARD_FACTOR = 1.15

# Flags of a run on 8 ranks, and the parts of its only error.
ERRORS = {
    "--pipeline-model-parallel-size 8": ["invalid settings: Number of layers should be divisible"],
    "--global-batch-size 40": ["invalid settings: eval_global_batch_size (40) must be divisible by"],
    "--routing-mask for_2_ranks.safetensors --expert-model-parallel-size 4": ["rank-local", "size 2", "4"],
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model data.bin": [
        "the tokenizer (SentencePieceTokenizer data.bin) cannot be made"
    ],
    "--hybrid-layer-pattern /*E": ["invalid settings: ZeroDivisionError"],
    "--hybrid-layer-pattern *E*E --pipeline-model-parallel-size 8": ["the model cannot be made: "],
    "--wandb-project p --save=": ["--wandb-project needs a run folder: pass --save or --tensorboard-dir"],
    "--load save/nowhere --ckpt-step 3": ["holds no intact checkpoint: save/nowhere/iter_0000003 does not exist"],
}
MANY_RANKS = "more ranks than there are GPUs"


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory) -> Path:
    """A folder with a dataset, and with masks for it: of the model, of any number of layers, and rank-local."""
    folder = tmp_path_factory.mktemp("run_check")
    random = np.random.default_rng(1)
    write_documents(folder / "data", np.minimum(random.zipf(1.3, size=(30, 100)), VOCAB_SIZE) - 1)
    frequency = count_token_frequency([str(folder / "data")], VOCAB_SIZE, workers=1)
    recipe = MaskRecipe(8, 4, "uniform", 0.4, frequent_visible_experts=4)
    build_routing_mask(recipe, frequency=frequency).save(folder / "mask.safetensors")
    recipe = MaskRecipe.from_preset("smoe", 8, 5, shared_table=True)
    build_routing_mask(recipe, vocab_size=VOCAB_SIZE).save(folder / "shared.safetensors")
    recipe = MaskRecipe(8, 4, "rank-local", 0.4, 4, expert_model_parallel_size=2)
    build_routing_mask(recipe, frequency=frequency).save(folder / "for_2_ranks.safetensors")
    return folder


Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answer(working_folder, tmp_path_factory) -> Callable[..., Answers]:
    """Run a command of `run_check_ranks.py` on cases in a folder that has a dataset and masks.

    The function takes the command, the flags of each case besides `BASE` and the layers of a GPT model by name, the
    number of ranks that a case is checked for (by default 1), and the number of ranks of the script. It returns the
    answers of each rank by name.
    """

    def answer(command: str, cases: Mapping[str, str], ranks: Mapping[str, int] = {}, processes: int = 1) -> Answers:
        folder = tmp_path_factory.mktemp(command)
        described = {}
        for name, flags in cases.items():
            # --global-batch-size cannot be as large as these ranks need, but the default of Megatron can.
            base = BASE.replace("--global-batch-size 8", "") if name == MANY_RANKS else BASE
            layers = [] if "--hybrid-layer-pattern" in flags else ["--num-layers", "4"]
            words = [*shlex.split(base), *layers, "--routing-mask", "shared.safetensors", *shlex.split(flags)]
            described[name] = {"ranks": ranks.get(name, 1), "flags": words}
        arguments = (command, described, working_folder)
        return run_as_ranks(answer_cases, folder, *arguments, world_size=processes, timeout=500, joins=False)

    return answer


@pytest.fixture(scope="module")
def reports(answer) -> dict[str, Any]:
    """The reports of all cases, made by one process."""
    errors = {flags: f"--global-batch-size 16 {flags}" for flags in ERRORS}
    ranks = dict.fromkeys([*LAYOUTS, "flex dispatcher"], 2) | dict.fromkeys(errors, 8)
    ranks[MANY_RANKS] = 1_000_000_007
    libraries = {"flex dispatcher": FLEX, "Mamba": hybrid("*-ME")}
    libraries["FP8"] = f"{LLAMA} {BF16} {FP8} --distributed-backend nccl"
    libraries["frequent ids with more experts"] = f"{LLAMA} --routing-mask mask.safetensors"
    cases = ARCHITECTURES | hybrids() | FORWARD | LAYOUTS | errors | libraries | {MANY_RANKS: ""}
    return answer("report", cases, ranks=ranks)[0]


@pytest.fixture(scope="module")
def built(answer) -> dict[str, Any]:
    return answer("build", ARCHITECTURES | hybrids() | FORWARD)[0]


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


def test_operations_of_latent_attention(reports):
    hidden, heads, sequence = 64, 4, 64
    queries = hidden * 32 + 32 * heads * (16 + 8)
    keys_and_values = hidden * (24 + 8) + 24 * heads * (16 + 20)
    # A token attends to half of the sequence in the mean.
    scores_and_sums = sequence / 2 * heads * (16 + 8 + 20)
    norms = 32 + 24
    attention = queries + keys_and_values + scores_and_sums + heads * 20 * hidden + norms
    mlp, experts, logits = 3 * hidden * 96, 2 * 3 * hidden * 48, hidden * 512
    operations = 6 * (2 * attention + mlp + experts + logits)
    assert reports["hybrid with latent attention"]["cost"]["flops_per_token"] == pytest.approx(operations)


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


def test_flags_that_nobody_has_tried_are_a_note(reports):
    (note,) = reports["FP8"]["notes"]
    assert note == "not tried with a routing mask on GPUs: all flags"
    assert not reports["FP8"]["errors"]
    assert reports["FP8"]["parameters"] == reports["untied embeddings, gate"]["parameters"]


def test_library_of_the_flex_dispatcher_may_be_missing(reports):
    flex, expert_parallel = reports["flex dispatcher"], reports["expert parallel, bf16, distributed optimizer"]
    assert not flex["errors"]
    assert flex["parameters"] == expert_parallel["parameters"]


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba_ssm is installed")
def test_missing_library_of_mamba_layers_is_a_note(reports):
    mamba = reports["Mamba"]
    assert not mamba["errors"]
    assert any("MambaSSM is not installed" in note for note in mamba["notes"])
    assert mamba["parameters"] is None


def test_mamba_layers_are_counted_where_they_can_be_built(answer):
    (reports,) = answer("report_with_mamba", {name: hybrid(name) for name in ("*-ME", "*-E")})
    parameters, without = (reports[name]["parameters"] for name in ("*-ME", "*-E"))
    assert parameters["total"] == without["total"] + 10


# The local modules cannot run experts with biases, and the estimate leaves gated delta nets out.
@pytest.mark.parametrize("name", [*FORWARD, "multi-token prediction", *list(HYBRIDS)[1:3]])
def test_activations_are_near_those_of_a_forward_pass(name, reports, built):
    (memory,) = reports[name]["memory"]["stages"]
    estimate = memory["activations"] + memory["logits"]
    assert built[name]["kept"] / FORWARD_FACTOR < estimate < built[name]["kept"] * FORWARD_FACTOR


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_of_a_run(name, answer, reports):
    report = reports[name]
    case = {name: LAYOUTS[name]}
    measured = [of_rank[name] for of_rank in answer("measure", case, processes=2)]
    assert sum(rank["parameters"] for rank in measured) == report["parameters"]["total"]
    stages = report["memory"]["stages"]
    for part in ("weights", "gradients", "routing_mask"):
        for rank in measured:
            assert rank[part] == stages[rank["stage"]][part]
    # The ranks that share an optimizer differ by the padding of its buckets.
    for stage, memory in enumerate(stages):
        optimizers = [rank["optimizer"] for rank in measured if rank["stage"] == stage]
        assert sum(optimizers) == len(optimizers) * memory["optimizer"]


# A run with many errors, on 24 ranks, and a part of each error.
FAULTY = (
    f"{BASE} --num-layers 4 --num-experts 12 --vocab-size 500 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 5 --global-batch-size 9 --spec a b --routing-mask mask.safetensors "
    "--data-path nowhere data elsewhere --save data.idx --tensorboard-dir events --load no_checkpoint"
).replace("--mock-data", "")
FAULTS = (
    "--spec, --experimental-attention-variant, ",
    "invalid settings: ",
    "vocabulary size is 510, the model's is 500; its number of experts is 8, the model's is 12",
    "--save data.idx: cannot write in",
    "--load no_checkpoint holds no checkpoint; leave --load out",
    "nowhere.idx does not exist",
    "elsewhere.idx does not exist",
)


def test_all_errors_at_once(working_folder, tmp_path, files_and_times):
    """A user starts the check of the run, which changes no file."""
    before = files_and_times(working_folder)
    command = [sys.executable, "-m", "maskmoe.training.check", "--check", "24", *shlex.split(FAULTY)]
    process = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")],
        cwd=working_folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 2
    report = json.loads((tmp_path / "report.json").read_text())
    errors = report["errors"]
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: {error}" for error in errors]
    assert "Traceback" not in process.stderr
    assert len(set(errors)) == len(errors)
    for fault in FAULTS:
        assert sum(fault in error for error in errors) == 1, (fault, errors)
    (note,) = report["notes"]
    assert note.startswith("not tried with a routing mask: ")
    assert (report["layout"], report["can_start"]) == (None, False)
    assert files_and_times(working_folder) == before


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


@pytest.mark.slow
@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_a_machine_with_gpus_is_judged_by_its_packages(answer):
    (reports,) = answer("report_on_a_gpu", {"defaults": LLAMA})
    assert reports["defaults"]["errors"] == []
    note, *_ = reports["defaults"]["notes"]
    assert note.startswith("Transformer Engine is not installed, so the default is --transformer-impl local")
