"""The settings that are refused, the settings that a test has trained with, and what a run needs."""

import argparse
import re
from dataclasses import replace
from functools import cache

import megatron.core
import pytest
from megatron.training.arguments import add_megatron_arguments
from packaging.version import Version
from support.paths import ROOT

from maskmoe.errors import UserError
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.training.settings import support
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments
from maskmoe.training.settings.support import (
    KNOWN_BUGS,
    NEVER,
    flags_of,
    missing_flags,
    missing_transformer_engine,
    note_on_flex,
    note_on_unproven,
    outdated_packages,
    proven,
    refusals,
)
from maskmoe.transformer.router import check_router_settings

MODEL = "--num-experts 8 --routing-mask mask.safetensors --disable-bias-linear --transformer-impl local"
ENGINE = "--transformer-impl transformer_engine"
PACKED = "--dataloader-inter-document-masking"
PADDED = "--moe-pad-expert-input-to-capacity --moe-expert-capacity-factor"
MUON = "--tensor-model-parallel-size 2 --sequence-parallel --optimizer muon --use-distributed-optimizer"
INSTANCES = "--overlap-grad-reduce --num-distributed-optimizer-instances 2"
PIPELINE = "--pipeline-model-parallel-size 2"
SCHEDULE = "--step-batch-size-schedule 0:4"
CLAMP = "--activation-func-clamp-value 7"
# Flags that are refused, of which the error names the first; and after `|` flags beside them that are not. `~`: without
# the flags of `MODEL`.
REFUSED = (
    "~--routing-mask mask.safetensors | ~",
    "~--hybrid-layer-pattern *E*E | ~--hybrid-layer-pattern *-*-",
    "--hybrid-layer-pattern *-*- | --hybrid-layer-pattern *E*E",
    "--spec a b",
    f"--fp8-recipe delayed --fp8-format hybrid {ENGINE} | --fp8-recipe mxfp8 --fp8-format hybrid {ENGINE}",
    f"--fp4-recipe custom --fp4-format e2m1 {ENGINE} | --fp4-format e2m1 {ENGINE}",
    f"{PACKED} --context-parallel-size 2 | {PACKED} --micro-batch-size 2",
    f"{PACKED} --fim-data --tokenizer-type HuggingFaceTokenizer | --fim-data --tokenizer-type HuggingFaceTokenizer",
    f"{PACKED} --micro-batch-size 2 --moe-router-load-balancing-type aux_loss seq_aux_loss"
    f"| {PACKED} --micro-batch-size 1 --moe-router-load-balancing-type seq_aux_loss",
    "--ckpt-format torch",
    "--async-strategy nvrx --async-save | --async-save",
    f"--moe-shared-expert-overlap {CLAMP} | {CLAMP} --glu-linear-offset 1",
    f"--use-te-activation-func --swiglu {CLAMP} | --use-te-activation-func --quick-geglu",
    "--use-transformer-engine-op-fuser --quick-geglu | --use-transformer-engine-op-fuser --swiglu",
    "~--tensor-model-parallel-size 2 --multi-latent-attention | ~--tensor-model-parallel-size 2",
    "~--tensor-model-parallel-size 2 --hybrid-layer-pattern G-*- | ~--tensor-model-parallel-size 2 "
    "--sequence-parallel --hybrid-layer-pattern G-*-",
    "--overlap-dispatch-backward-with-experts-wgrad",
    f"--pipeline-model-parallel-layout Et|tt|tm|L {PIPELINE} | --pipeline-model-parallel-layout Et|t|tt|mL {PIPELINE}",
    "--context-parallel-size 2 --mtp-num-layers 1 | --context-parallel-size 2",
    "--fp16 | --fp16 --loss-scale 1024",
    f"--reset-attention-mask {ENGINE} | --reset-attention-mask --reset-position-ids",
    f"--reset-attention-mask --no-create-attention-mask-in-dataloader | --reset-attention-mask {PACKED}",
    f"{SCHEDULE} | {SCHEDULE} --train-samples 8",
    "--optimizer soap | --optimizer muon",
    "--optimizer-cpu-offload",
    f"--exp-avg-dtype fp16 --fp8-format hybrid --fp8-recipe mxfp8 {ENGINE}"
    f"| --exp-avg-dtype bf16 --fp8-format hybrid --fp8-recipe mxfp8 {ENGINE}",
    "--te-rng-tracker --recompute-activations --hidden-dropout 0 | --recompute-activations",
    "--te-rng-tracker --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    "| --te-rng-tracker --recompute-granularity selective --recompute-modules moe",
    f"--num-distributed-optimizer-instances 2 --overlap-grad-reduce {PIPELINE}"
    f"| {INSTANCES} {PIPELINE} --no-align-grad-reduce | {INSTANCES}",
    f"--optimizer muon {MUON} --group-query-attention --num-query-groups 1"
    f"| {MUON} --group-query-attention --num-query-groups 1 --muon-no-split-qkv",
    f"--optimizer muon {MUON} --expert-tensor-parallel-size 1"
    f"| {MUON} --expert-tensor-parallel-size 1 --expert-model-parallel-size 2",
    "--non-persistent-save-interval 5",
    "--use-megatron-fsdp",
    "--fine-grained-activation-offloading",
    "--qk-clip",
    "--init-model-with-meta-device",
    "--moe-router-topk 9 | --moe-router-topk 8",
    "--moe-router-group-topk 3 --moe-router-num-groups 4 --moe-router-topk 2"
    "| --moe-router-group-topk 2 --moe-router-num-groups 4 --moe-router-topk 2",
    "--moe-router-group-topk 1 --moe-router-num-groups 4 --moe-router-topk 3",
    "--moe-router-topk-scaling-factor 0 | --moe-router-topk-scaling-factor 2",
    "--moe-apply-probs-on-input --moe-router-topk 2 | --moe-apply-probs-on-input --moe-router-topk 1",
    f"~--moe-apply-probs-on-input --num-experts 8 --moe-router-topk 1 {PADDED} 4"
    f"| --moe-apply-probs-on-input --moe-router-topk 1 {PADDED} 4",
    "--moe-router-load-balancing-type aux_loss sinkhorn | --moe-router-load-balancing-type aux_loss seq_aux_loss",
    "--moe-router-fusion",
    "--transformer-impl inference_optimized",
    "--moe-router-padding-for-quantization",
    f"--cuda-graph-impl transformer_engine {ENGINE} --cuda-graph-modules attn",
)


@cache
def parser() -> argparse.ArgumentParser:
    complete = add_maskmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    add_pretraining_arguments(complete)
    complete.set_defaults(gradient_accumulation_fusion=True, apply_rope_fusion=False)  # as on a GPU without the latter
    return complete


def parse(flags: str) -> argparse.Namespace:
    model = "" if flags.strip().startswith("~") else MODEL
    return parser().parse_args([*model.split(), *flags.strip().removeprefix("~").split()])


def errors_of(args: argparse.Namespace) -> list[str]:
    """Return the errors of the rows and, if there is one, of the router, which reads a configuration."""
    errors = list(refusals(args))
    try:
        if args.num_experts:
            check_router_settings(argparse.Namespace(**vars(args), num_moe_experts=args.num_experts))
    except UserError as error:
        errors.append(str(error))
    return errors


@pytest.mark.parametrize("case", REFUSED)
def test_setting_is_refused_and_its_neighbours_are_not(case: str) -> None:
    refused, *neighbours = re.split(r"\|(?= *[~-]|$)", case.replace(" | ", "|"))
    (error,) = errors_of(parse(refused))
    assert refused.removeprefix("~").split()[0] in error
    for flags in neighbours:
        assert not errors_of(parse(flags))


@pytest.mark.parametrize("latent", ["--multi-latent-attention", "--hybrid-layer-pattern +E"])
def test_fused_rotary_embedding_of_latent_attention_is_refused(latent: str) -> None:
    args = parse(latent)
    assert not errors_of(args)
    args.apply_rope_fusion = True  # the default on GPUs with Transformer Engine
    assert "--no-rope-fusion" in "".join(errors_of(args))


def test_flags_of_the_rows_exist() -> None:
    named = {flag for row in (*NEVER, *KNOWN_BUGS) for flag in re.findall(r"--[\w-]+", row.flags)}
    assert named <= parser()._option_string_actions.keys()


@pytest.mark.parametrize("row", KNOWN_BUGS, ids=lambda row: row.flags)
def test_bug_of_megatron_is_reported_and_not_mended(row: support.Refusal) -> None:
    assert row.issue.startswith("https://github.com/NVIDIA/") or (ROOT / row.issue).is_file()
    assert not row.fixed_in or Version(row.fixed_in) > Version(megatron.core.__version__)


def test_row_is_inactive_from_the_version_on_that_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    args, row = parse("--qk-clip"), next(row for row in KNOWN_BUGS if row.flags == "--qk-clip")
    for fixed_in, is_refused in (("0.20", True), (megatron.core.__version__, False)):
        monkeypatch.setattr(support, "KNOWN_BUGS", (replace(row, fixed_in=fixed_in),))
        assert bool(list(refusals(args))) == is_refused


# ---- What a test has trained with ------------------------------------------------------------------------------------


def test_proven_flags_are_those_of_the_declared_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "generators")
    import proven as generator

    assert generator.PROVEN.read_text() == generator.table([]), "stale: run docs/generators/proven.py"


def test_flags_of_a_command_line() -> None:
    words = "--bf16 --lr=1 --moe-router-load-balancing-type aux_loss seq_aux_loss --normalization=RMSNorm --lr 2"
    balancing = "--moe-router-load-balancing-type"
    expected = ["--bf16", "--lr", f"{balancing} aux_loss", f"{balancing} seq_aux_loss", "--normalization RMSNorm"]
    assert flags_of(parser(), words.split()) == expected


def test_note_on_flags_that_nobody_has_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--num-experts" in proven()["cpu"]
    assert note_on_unproven(["--num-experts", "--bf16"], "cpu") is None
    assert note_on_unproven(["--bf16", "--sft"], "cpu") == "not tried with a routing mask: --sft"
    monkeypatch.setattr(support, "proven", lambda: {"cpu": frozenset(), "gpu": frozenset()})
    assert note_on_unproven(["--bf16"], "gpu") == "not tried with a routing mask on GPUs: all flags"


@pytest.mark.parametrize(
    ("flags", "gpus_of_node", "has_deep_ep", "is_recommended"),
    [
        ("--expert-model-parallel-size 16", 8, True, True),
        ("--expert-model-parallel-size 16", 8, False, False),
        ("--expert-model-parallel-size 8", 8, True, False),
        ("--expert-model-parallel-size 8 --expert-tensor-parallel-size 2", 8, True, True),
        ("--expert-model-parallel-size 16 --moe-token-dispatcher-type flex", 8, True, False),
    ],
)
def test_flex_is_recommended_between_nodes(flags, gpus_of_node: int, has_deep_ep: bool, is_recommended: bool) -> None:
    note = note_on_flex(parse(f"--bf16 {flags}"), gpus_of_node, has_deep_ep)
    assert is_recommended == (note is not None and "--moe-token-dispatcher-type flex" in note)


# ---- What a run needs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "package", "least", "older"),
    [
        ("--hybrid-layer-pattern G-", "flash-linear-attention", "0.5.2", "0.5.1"),
        (f"--softmax-type learnable {ENGINE}", "transformer-engine", "2.14", "2.13.0+abc"),
        ("--moe-permute-fusion", "transformer-engine", "2.20.2", "2.20.0.dev0"),
        ("--moe-grouped-gemm --no-gradient-accumulation-fusion", "transformer-engine", "2.19", "2.18.1"),
    ],
)
def test_version_that_computes_something_else(monkeypatch, flags: str, package: str, least: str, older: str) -> None:
    monkeypatch.setenv(support._GROUPED_GEMM, "1")
    for found, errors in ((older, 1), (least, 0)):
        monkeypatch.setattr(support, "version", {package: found}.__getitem__)
        assert len(list(outdated_packages(parse(flags)))) == errors


@pytest.mark.parametrize(
    ("flags", "packages", "errors"),
    [
        ("--recompute-granularity selective --recompute-modules moe_act", GpuPackages(transformer_engine=False), 1),
        ("--recompute-granularity selective --recompute-modules moe_act", GpuPackages(), 0),
        (ENGINE, GpuPackages(transformer_engine=False), 0),
    ],
)
def test_missing_transformer_engine(flags: str, packages: GpuPackages, errors: int) -> None:
    assert len(list(missing_transformer_engine(parse(flags), packages))) == errors


@pytest.mark.parametrize(
    ("flags", "has_checkpoint", "missing"),
    [
        ("", False, ["--seq-length", "--train-iters", "--lr"]),
        ("--no-initialization", True, ["--seq-length", "--train-iters", "--lr"]),
        ("--no-initialization --seq-length 8 --train-iters 1 --lr 1", False, ["--no-initialization"]),
        ("--skip-train --seq-length 8", False, ["--train-iters"]),  # Megatron multiplies by the length
    ],
)
def test_flags_that_megatron_misses_late(flags: str, has_checkpoint: bool, missing: list[str]) -> None:
    errors = list(missing_flags(parse(flags), has_checkpoint))
    assert len(errors) == len(missing)
    assert all(flag in error for flag, error in zip(missing, errors, strict=True))
